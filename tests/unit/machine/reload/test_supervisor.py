"""What happens when the process that serves a guest ends without a word. The processes are real, and small."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from vmbus.errors import UserError
from vmbus.machine.host import ExitReason
from vmbus.machine.host_parts import HostOptions
from vmbus.machine.reload.keeper import Keeper, Serving
from vmbus.machine.reload.supervisor import IN_A_ROW, SHORT, AttachedMachine, Supervisor
from vmbus.machine.reload.worker import Worker

SAYS = """
import json, os, sys, socket, struct
sys.path.insert(0, {path!r})
from vmbus.machine.reload.link import Link
import asyncio
words = sys.argv
link = Link(socket.socket(fileno=int(words[words.index("--link") + 1])), "keeper")
keeper = Link(socket.socket(fileno=int(words[words.index("--keeper") + 1])), "keeper")

async def main():
    asked = await link.hear("recover", timeout=60)
    with open({log!r}, "a") as log:
        log.write(json.dumps([asked.values["monitor"], asked.values["devices"], asked.values["takeovers"]]) + "\\n")
    said = {says!r}
    if said == "dies":
        os._exit(3)
    elif said == "killed":
        os.kill(os.getpid(), 9)
    elif said == "refuses":
        await link.refuse("no journal")
    elif said == "left" and asked.values["monitor"] == "first":
        await link.tell("left")
    else:
        await link.tell("recovered")
        if said == "serves":
            await keeper.tell("serving")
        await keeper.hear(timeout=60)

asyncio.run(main())
"""


class Machines:
    """A guest's QEMUs, by the names of their sockets."""

    def __init__(self, *names: str, end: ExitReason | None = None) -> None:
        self.names = list(names)
        self.end = end
        self.done: list[str] = []

    def monitor(self) -> Path:
        return Path(self.names[0])

    def has_next(self) -> bool:
        return len(self.names) > 1

    async def take_machine(self) -> None:
        self.done.append(f"end {self.names.pop(0)}")

    async def discard_machine(self) -> None:
        self.done += [f"end {name}" for name in self.names[1:]]
        del self.names[1:]

    async def ended(self) -> ExitReason | None:
        return self.end


class Time:
    """A clock that is moved by hand."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


@contextlib.contextmanager
def supervisor(machines: Machines, clock: Time) -> Iterator[Supervisor]:
    reading, writing = os.pipe()
    found = Supervisor(machines, Path("guest"), HostOptions(journal=True), ["echo"], writing, clock=clock)
    try:
        yield found
    finally:
        found.close()
        found.close()
        assert os.read(reading, 1) == b""
        os.close(reading)


def program(folder: Path, says: str) -> list[str]:
    """Return the command line of a worker that ``says`` one thing."""
    path = str(Path(sys.modules["vmbus"].__path__[0]).parent)
    (folder / f"{says}.py").write_text(SAYS.format(path=path, log=str(folder / "log"), says=says))
    return [sys.executable, str(folder / f"{says}.py")]


def ended(folder: Path, says: str) -> Worker:
    """Return a worker that was killed; the next one ``says`` one thing."""
    process = SimpleNamespace(returncode=-signal.SIGKILL)
    return cast("Worker", SimpleNamespace(program=program(folder, says), process=process))


def asked(folder: Path) -> list[str]:
    """Return what workers were asked for."""
    return (folder / "log").read_text().splitlines()


async def test_a_worker_is_asked_to_recover_the_guest_and_the_second_qemu_of_a_move_ends(
    tmp_path: Path,
) -> None:
    machines, clock = Machines("first", "second"), Time()
    with supervisor(machines, clock) as found:
        for number in range(IN_A_ROW * 2):  # each after a long service
            clock.now += SHORT + 1
            worker = await found.recover(ended(tmp_path, "serves"), "killed")
            assert isinstance(worker, Worker)
            assert await found.serves(worker)
            await worker.close()
            assert found.takeovers == number + 1
            assert asked(tmp_path)[-1] == f'["first", ["echo"], {number + 1}]'
    assert machines.done == ["end second"]


async def test_a_guest_that_has_left_its_qemu_is_looked_for_in_the_next_one(tmp_path: Path) -> None:
    machines = Machines("first", "second")
    with supervisor(machines, Time()) as found:
        worker = await found.recover(ended(tmp_path, "left"), "killed")
        assert isinstance(worker, Worker)
        await worker.close()
    assert machines.done == ["end first"]
    assert [line.split('"')[1] for line in asked(tmp_path)] == ["first", "second"]


async def test_a_guest_that_has_left_for_elsewhere_was_migrated(tmp_path: Path) -> None:
    with supervisor(Machines("first"), Time()) as found:
        assert await found.recover(ended(tmp_path, "left"), "killed") is ExitReason.MIGRATED


@pytest.mark.parametrize(
    ("says", "how", "limit"),
    [("dies", "with status 3", IN_A_ROW), ("killed", "by SIGKILL", 2 * IN_A_ROW)],
)
async def test_workers_that_end_at_once_are_given_up_and_late_deaths_are_not_counted(
    tmp_path: Path, says: str, how: str, limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vmbus.machine.reload.supervisor.KILLED_IN_A_ROW", 2 * IN_A_ROW)
    clock = Time()
    with supervisor(Machines("first"), clock) as found:
        with pytest.raises(UserError, match=f"{limit + 1} emulators .* ended {how}; the guest is given"):
            await found.recover(ended(tmp_path, says), "killed")
        assert len(asked(tmp_path)) == limit
        clock.now += SHORT
        worker = await found.recover(ended(tmp_path, "serves"), "killed")
        assert isinstance(worker, Worker)
        await worker.close()


@pytest.mark.parametrize("says", ["refuses", "dies"])
@pytest.mark.parametrize("reason", [ExitReason.POWERED_OFF, ExitReason.QEMU_GONE])
async def test_the_end_of_qemu_is_the_reason_whatever_the_worker_says(
    tmp_path: Path, says: str, reason: ExitReason
) -> None:
    with supervisor(Machines("first", end=reason), Time()) as found:
        assert await found.recover(ended(tmp_path, says), "killed") is reason
    assert len(asked(tmp_path)) == 1


async def test_a_guest_that_cannot_be_taken_over_is_given_up_with_both_reasons(tmp_path: Path) -> None:
    with (
        supervisor(Machines("first"), Time()) as found,
        pytest.raises(UserError, match=r"ended unexpectedly \(killed\).* cannot go on: no journal"),
    ):
        await found.recover(ended(tmp_path, "refuses"), "killed")


async def test_a_worker_that_took_over_is_told_from_one_that_did_not(tmp_path: Path) -> None:
    with supervisor(Machines("first"), Time()) as found:
        worker = Worker.start([sys.executable, "-c", "pass"], supervised=True)
        assert not await found.serves(worker)


async def test_an_attached_qemu_is_seen_to_end() -> None:
    machine = AttachedMachine(Path("q"), os.getpid())
    assert (machine.monitor(), machine.has_next()) == (Path("q"), False)
    assert await AttachedMachine(Path("q"), 2**22 + 1).ended() is ExitReason.QEMU_GONE


class Dying:
    """A worker that has ended; ``keeper`` says so."""

    program = ("vmbus",)

    def __init__(self) -> None:
        self.told_to_end = 0
        self.closed = 0

    def tell_to_end(self) -> None:
        self.told_to_end += 1

    async def close(self) -> str:
        self.closed += 1
        return "process 7 ended"


class Replacing:
    """A supervisor that has one answer."""

    def __init__(self, answer: Any, *, serves: bool = False) -> None:
        self.answer = answer
        self._serves = serves
        self.asked = 0

    async def serves(self, worker: Worker) -> bool:
        return self._serves

    async def recover(self, ended: object, how: str) -> Any:
        self.asked += 1
        return self.answer


@pytest.mark.parametrize("took_over", [False, True])
async def test_a_keeper_follows_the_worker_that_took_over_or_starts_one(took_over: bool) -> None:
    keeper = Keeper(cast("Serving", SimpleNamespace()))
    following, third = Dying(), Dying()
    replacing = Replacing(third, serves=took_over)
    keeper._next = cast("Worker", following)
    keeper._supervisor = cast("Supervisor", replacing)
    assert await keeper._replace(cast("Worker", Dying()), "killed") is None
    assert cast("Dying", keeper._worker) is (following if took_over else third)
    assert replacing.asked == (not took_over)
    assert keeper._next is None
    assert third.told_to_end == following.told_to_end == 0


async def test_a_keeper_that_was_asked_to_end_starts_no_worker_and_ends_one_that_took_over() -> None:
    keeper = Keeper(cast("Serving", SimpleNamespace()))
    keeper.tell_to_end()
    replacing = Replacing(Dying())
    keeper._supervisor = cast("Supervisor", replacing)
    assert await keeper._replace(cast("Worker", Dying()), "killed") is ExitReason.STOPPED
    assert not replacing.asked
    following = Dying()
    keeper._next = cast("Worker", following)
    keeper._supervisor = cast("Supervisor", Replacing(None, serves=True))
    assert await keeper._replace(cast("Worker", Dying()), "killed") is None
    assert following.told_to_end == 1
