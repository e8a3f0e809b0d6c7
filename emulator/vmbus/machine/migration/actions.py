"""Performs the actions of :mod:`vmbus.machine.migration.state_machine`, in order.

actions ──react──▶ at once: performed here and now
                   in time: a task; its answer gives the actions that follow, performed in the same task
                   IN_ORDER: a task that performs all that is left of the sequence, too
                                └── failure of an action ──▶ failed(report, error)
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Mapping

from vmbus.errors import QemuError, QemuGone, VmbusError
from vmbus.machine.migration.ports import Background
from vmbus.machine.migration.report import Report
from vmbus.machine.migration.state_machine import Action, Actions

_logger = logging.getLogger(__name__)

IN_ORDER = frozenset({Action.LIFT_FENCE})
"""Actions that take time, and that must be done before the next one begins."""


class StepFailed(QemuError):
    """An action that failed."""

    def __init__(self, action: Action, reason: str) -> None:
        super().__init__(f"{action.value}: {reason}")
        self.action = action
        self.reason = reason


class ActionRunner:
    """Performs actions by the functions of ``at_once`` and ``in_time``; the second return what follows.

    ``failed`` is called for an action that failed in a task: that is a failure of the migration, not of the host.
    """

    def __init__(
        self,
        service: Background,
        at_once: Mapping[Action, Callable[[], None]],
        in_time: Mapping[Action, Callable[[Report], Awaitable[Actions]]],
        failed: Callable[[Report, StepFailed], None],
    ) -> None:
        self._service = service
        self._at_once = at_once
        self._in_time = in_time
        self._failed = failed

    def react(self, actions: Actions, report: Report) -> None:
        """Perform ``actions``; those that take time, and what follows them, in a task of their own."""
        for at, action in enumerate(actions):
            if action in IN_ORDER:
                self._service.background(self._attempt(actions[at:], report))
                return
            if action in self._at_once:
                self._at_once[action]()
            else:
                self._service.background(self._attempt((action,), report))

    async def _attempt(self, actions: Actions, report: Report) -> None:
        try:
            await self.perform(actions, report)
        except StepFailed as error:
            self._failed(report, error)

    async def perform(self, actions: Actions, report: Report) -> None:
        """Perform ``actions`` for the migration ``report``, and those that follow from their answers.

        Raises :class:`StepFailed`, and :class:`~vmbus.errors.QemuGone`.
        """
        for action in actions:
            if action in self._at_once:
                self._at_once[action]()
                continue
            try:
                following = await self._in_time[action](report)
            except QemuGone:
                raise
            except VmbusError as error:
                raise StepFailed(action, str(error)) from error
            except Exception as error:
                _logger.exception("internal error in a migration; please report this")
                raise StepFailed(action, f"internal error: {error!r}") from error
            await self.perform(following, report)
