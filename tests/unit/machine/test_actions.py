"""How the actions of a migration are performed: in order, and a failure is one of the migration."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from typing import Any

import pytest
from vmbus.errors import QemuError, QemuGone
from vmbus.machine.migration.actions import ActionRunner, StepFailed
from vmbus.machine.migration.report import Report
from vmbus.machine.migration.state_machine import Action, Actions


class Rig:
    """A runner whose actions are written down; ``follows``: the answers of those that take time."""

    def __init__(self, follows: Mapping[Action, Actions | BaseException]) -> None:
        self.done: list[Action] = []
        self.failed: list[tuple[Report, Action, str]] = []
        self.tasks: list[asyncio.Task[Any]] = []
        at_once: dict[Action, Callable[[], None]] = {
            each: functools.partial(self.done.append, each) for each in (Action.PAUSE, Action.RESUME)
        }
        in_time: dict[Action, Callable[[Report], Awaitable[Actions]]] = {
            each: functools.partial(self._perform, each, answer) for each, answer in follows.items()
        }
        self.runner = ActionRunner(
            self,
            at_once,
            in_time,
            lambda report, error: self.failed.append((report, error.action, error.reason)),
        )

    def background(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        self.tasks.append(asyncio.ensure_future(work))
        return self.tasks[-1]

    async def _perform(self, action: Action, answer: Actions | BaseException, report: Report) -> Actions:
        await asyncio.sleep(0)
        self.done.append(action)
        if isinstance(answer, BaseException):
            raise answer
        return answer

    async def react(self, *actions: Action) -> None:
        self.runner.react(actions, REPORT)
        await asyncio.gather(*self.tasks)


REPORT = Report()


async def test_what_needs_no_time_is_done_before_react_returns() -> None:
    rig = Rig({Action.EXAMINE: ()})
    rig.runner.react((Action.EXAMINE, Action.PAUSE), REPORT)
    assert rig.done == [Action.PAUSE]
    await asyncio.gather(*rig.tasks)
    assert rig.done == [Action.PAUSE, Action.EXAMINE]


async def test_nothing_begins_before_the_fence_is_lifted() -> None:
    rig = Rig({Action.LIFT_FENCE: (), Action.RESUME_GUEST: ()})
    await rig.react(Action.PAUSE, Action.LIFT_FENCE, Action.RESUME_GUEST, Action.RESUME)
    assert rig.done == [Action.PAUSE, Action.LIFT_FENCE, Action.RESUME_GUEST, Action.RESUME]


async def test_what_follows_an_answer_is_done_before_the_next_action() -> None:
    rig = Rig(
        {Action.SETTLE: (Action.QUIESCE, Action.RESUME), Action.QUIESCE: (Action.PAUSE,), Action.SAVE: ()}
    )
    await rig.runner.perform((Action.SETTLE, Action.SAVE), REPORT)
    assert rig.done == [Action.SETTLE, Action.QUIESCE, Action.PAUSE, Action.RESUME, Action.SAVE]


@pytest.mark.parametrize(
    ("error", "reason"), [(QemuError("no"), "no"), (KeyError("x"), "internal error: KeyError('x')")]
)
async def test_a_failure_ends_the_sequence_and_names_its_action(error: Exception, reason: str) -> None:
    rig = Rig({Action.SETTLE: (Action.SAVE, Action.RESUME), Action.SAVE: error})
    await rig.react(Action.SETTLE)
    assert rig.done == [Action.SETTLE, Action.SAVE]
    assert rig.failed == [(REPORT, Action.SAVE, reason)]
    with pytest.raises(StepFailed, match=f"{Action.SAVE.value}: "):
        await rig.runner.perform((Action.SAVE,), REPORT)


async def test_the_end_of_qemu_is_no_failure_of_a_migration() -> None:
    rig = Rig({Action.SAVE: QemuGone("it ended")})
    with pytest.raises(QemuGone):
        await rig.react(Action.SAVE)
    assert rig.failed == []
