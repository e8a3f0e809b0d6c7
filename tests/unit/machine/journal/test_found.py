"""What the next emulator makes of a guest, with each kind of journal that it can find."""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import cast

import pytest
from vmbus.errors import GatewayError
from vmbus.machine import takeover
from vmbus.machine.gateway.client import Gateway
from vmbus.machine.journal.reading import JournalRefused, read
from vmbus.machine.journal.recorder import Recorder
from vmbus.machine.journal.recovery import RecoveredGuest
from vmbus.machine.journal.store import Journal
from vmbus.machine.journal.values import ABOUT, ABOUT_VALUE, BUS, FORM, About
from vmbus.machine.qemu.qmp import Qmp
from vmbus.machine.takeover import GuestLost
from vmbus.wire import journal as wire
from vmbus.wire.gateway import GuestState

Recorded = tuple[mmap.mmap, Journal, Recorder]
RESETS = 3
"""Of the journal that is recorded."""


class Found:
    """The gateway of a QEMU that an emulator has left; ``journal``: its bytes, if it can have one."""

    def __init__(
        self, journal: bytes | None, *, guest: GuestState = GuestState.ENGAGED, resets: int = RESETS
    ) -> None:
        self._file = None if journal is None else os.memfd_create("journal")
        if self._file is not None:
            os.write(self._file, journal or b"")
        self.guest = guest
        self.resets = resets
        self.forgotten = 0
        self.mapped: list[mmap.mmap] = []

    def close(self) -> None:
        if self._file is not None:
            os.close(self._file)

    def journal_memory(self) -> mmap.mmap:
        if self._file is None:
            raise GatewayError("the trap gateway refused the journal: restart QEMU")
        self.mapped.append(mmap.mmap(self._file, 0))
        return self.mapped[-1]

    def forget_requests(self) -> None:
        self.forgotten += 1

    def find(self, *, detached: bool = False) -> RecoveredGuest | JournalRefused | None:
        found = takeover.find_guest(cast("Gateway", self), takeover=detached)
        assert all(each.closed for each in self.mapped)
        return found

    def bytes(self) -> bytes:
        with self.journal_memory() as memory:
            return memory[:]


Make = Callable[..., Found]


@pytest.fixture
def found() -> Iterator[Make]:
    with ExitStack() as stack:

        def make(journal: bytes | None, **more: object) -> Found:
            gateway = Found(journal, **more)  # type: ignore[arg-type]
            stack.callback(gateway.close)
            return gateway

        yield make


def refused(result: object) -> str:
    """The reason of a refusal."""
    assert isinstance(result, JournalRefused)
    return result.reason


async def test_a_guest_with_a_journal_is_found_and_nothing_of_it_is_touched(
    recorded: Recorded, found: Make
) -> None:
    memory = recorded[0][:]
    gateway = found(memory)
    result = gateway.find()
    assert isinstance(result, RecoveredGuest)
    assert (result.posts, result.resets) == (7, RESETS)
    assert (gateway.guest, gateway.forgotten) == (GuestState.ENGAGED, 0)
    assert gateway.bytes() == memory


@pytest.mark.parametrize("guest", [GuestState.FREE, GuestState.LEFT])
async def test_a_guest_that_needs_no_host_or_has_left_needs_no_journal(
    recorded: Recorded, found: Make, guest: GuestState
) -> None:
    gateway = found(recorded[0][:], guest=guest)
    assert gateway.find() is None
    assert gateway.guest is guest
    assert gateway.mapped == []


@pytest.mark.parametrize("resets", [RESETS + 1, RESETS + 7, 0])
async def test_a_guest_that_was_reset_since_boots(recorded: Recorded, found: Make, resets: int) -> None:
    gateway = found(recorded[0][:], resets=resets)
    assert gateway.find() is None
    assert (gateway.guest, gateway.forgotten) == (GuestState.FREE, 1)


async def test_a_guest_whose_emulator_was_detached_is_refused_and_one_that_was_reset_is_not(
    recorded: Recorded, found: Make
) -> None:
    gateway = found(recorded[0][:])
    assert refused(gateway.find(detached=True)) == "detached"
    assert gateway.forgotten == 0
    assert found(recorded[0][:], resets=RESETS + 1).find(detached=True) is None


def test_there_may_be_no_journal(found: Make) -> None:
    assert refused(found(None).find()) == "empty"
    assert refused(found(bytes(wire.MIN_SIZE)).find()) == "empty"


async def test_an_emulator_may_have_given_its_guest_up(recorded: Recorded, found: Make) -> None:
    memory, _, recorder = recorded
    recorder.pause("it was passed on")
    result = found(memory[:]).find()
    assert isinstance(result, JournalRefused)
    assert (result.reason, result.detail) == ("ended", "it was passed on")


async def test_the_last_transaction_may_be_torn_and_that_before_it_counts(
    recorded: Recorded, found: Make
) -> None:
    memory, journal, _ = recorded
    before = found(memory[:]).find()
    end = read(memory).end
    journal.commit({ABOUT: ABOUT_VALUE.build(About(FORM, RESETS + 1))})
    whole = found(memory[:], resets=RESETS + 1).find()
    assert isinstance(before, RecoveredGuest)
    assert isinstance(whole, RecoveredGuest)
    torn = bytearray(memory[:])
    torn[end : end + wire.MARK_SIZE] = bytes(wire.MARK_SIZE)
    result = found(bytes(torn)).find()
    assert isinstance(result, RecoveredGuest)
    assert (result.resets, result.contents.sequence) == (RESETS, before.contents.sequence)


def _foreign(memory: bytearray) -> None:
    memory[:8] = b"\x7fELF\2\1\1\0"


def _header(memory: bytearray) -> None:
    memory[12] ^= 1


def _both_snapshots(memory: bytearray) -> None:
    for half in (0, 1):
        at = wire.PAGE + half * wire.half_size(len(memory))
        memory[at : at + wire.MARK_SIZE] = bytes(wire.MARK_SIZE)


def _a_value(memory: bytearray) -> None:
    memory[wire.PAGE + 200] ^= 0x55


@pytest.mark.parametrize(
    ("damage", "reasons"),
    [
        (_foreign, {"foreign"}),
        (_header, {"damaged", "version"}),
        (_both_snapshots, {"damaged"}),
        (_a_value, {"damaged"}),
    ],
)
async def test_a_foreign_or_damaged_journal_is_refused_and_left_as_it_is(
    recorded: Recorded, found: Make, damage: Callable[[bytearray], None], reasons: set[str]
) -> None:
    memory = bytearray(recorded[0][:])
    damage(memory)
    gateway = found(bytes(memory))
    assert refused(gateway.find()) in reasons
    assert gateway.bytes() == bytes(memory)
    assert gateway.guest is GuestState.ENGAGED


@pytest.mark.parametrize(
    ("changes", "reason"),
    [({ABOUT: ABOUT_VALUE.build(About(99, RESETS))}, "version"), ({BUS: None}, "state")],
)
async def test_another_form_and_missing_values_are_refused(
    recorded: Recorded, found: Make, changes: dict[bytes, bytes | None], reason: str
) -> None:
    memory, journal, _ = recorded
    journal.commit(changes)
    assert refused(found(memory[:]).find()) == reason


# --- one that keeps no journal ----------------------------------------------------------------------------------


async def test_a_journal_of_before_is_retired_once(recorded: Recorded, found: Make) -> None:
    gateway = found(recorded[0][:])
    takeover.retire_journal(cast("Gateway", gateway))
    assert all(each.closed for each in gateway.mapped)
    assert refused(gateway.find()) == "empty"
    assert gateway.bytes()[len(wire.MAGIC) :] == recorded[0][len(wire.MAGIC) :]
    takeover.retire_journal(cast("Gateway", gateway))
    assert refused(gateway.find()) == "empty"


def test_something_else_is_retired_too_and_an_old_gateway_has_nothing(found: Make) -> None:
    foreign = found(b"foreign!" + bytes(wire.MIN_SIZE - 8))
    takeover.retire_journal(cast("Gateway", foreign))
    assert not any(foreign.bytes())
    takeover.retire_journal(cast("Gateway", found(None)))


# --- what the user is told --------------------------------------------------------------------------------------


class Status:
    """A QEMU with a status."""

    def __init__(self, status: str) -> None:
        self.status = status

    async def execute(self, command: str) -> dict[str, object]:
        assert command == "query-status"
        return {"status": self.status}


async def check(
    gateway: Found, result: object = None, *, status: str = "running", reset: bool = False
) -> None:
    await takeover.check_guest(
        cast("Qmp", Status(status)),
        cast("Gateway", gateway),
        reset=reset,
        found=cast("RecoveredGuest | JournalRefused | None", result),
    )


async def test_a_guest_is_served_if_it_boots_was_found_or_is_to_be_reset(
    recorded: Recorded, found: Make
) -> None:
    gateway = found(recorded[0][:])
    await check(gateway, gateway.find())
    await check(gateway, None, reset=True)
    await check(found(None, guest=GuestState.FREE))


@pytest.mark.parametrize(
    ("reason", "shown"), [("empty", False), ("ended", True), ("damaged", True), ("detached", True)]
)
async def test_why_a_journal_is_of_no_use_is_shown(found: Make, reason: str, shown: bool) -> None:
    with pytest.raises(GuestLost, match="reset it with") as lost:
        await check(found(None), JournalRefused(reason, "this is why"))
    assert ("its journal is of no use: this is why" in str(lost.value)) is shown


@pytest.mark.parametrize("reset", [False, True])
@pytest.mark.parametrize(
    ("guest", "status"), [(GuestState.LEFT, "running"), (GuestState.ENGAGED, "postmigrate")]
)
async def test_a_guest_that_has_left_is_never_served(
    recorded: Recorded, found: Make, guest: GuestState, status: str, reset: bool
) -> None:
    gateway = found(recorded[0][:])
    result = gateway.find()
    gateway.guest = guest
    with pytest.raises(GuestLost, match="must not run twice"):
        await check(gateway, result, status=status, reset=reset)
