"""Synthetic timers of a guest whose emulator is killed: none is lost, and none is early."""

from __future__ import annotations

from pathlib import Path
from unittest.mock import patch

import pytest
from vmbus.hypervisor.features import Features
from vmbus.hypervisor.partition import Partition
from vmbus.hypervisor.saved_state.values import VpState
from vmbus.ports import PAGE_SIZE
from vmbus.wire.msr import STIMER_CONFIG, Msr, StimerConfig
from vmbus.wire.synic import REFERENCE_TSC_PAGE

from tests.unit.machine.killed.guest import DIRECT_VECTOR, TIMER_SINT, TSC_PAGE, KilledGuest
from tests.unit.machine.killed.machine import FREQUENCY
from tests.unit.machine.killed.matrix import Matrix

MS = 10_000
"""Units of reference time."""
FEATURES = Features(stimer=True, stimer_direct=True)


class Timers:
    """The timers of a guest's vCPU 0, and its clock: the reference TSC page, as soon as that is valid."""

    def __init__(self, guest: KilledGuest) -> None:
        self.guest = guest
        self.last = 0
        guest.wrmsr(Msr.REFERENCE_TSC, TSC_PAGE * PAGE_SIZE | 1)
        guest.settle()

    def now(self) -> int:
        """Return the reference time; the page and the MSR agree, and time does not go back."""
        guest = self.guest
        page = REFERENCE_TSC_PAGE.parse(guest.memory.read(TSC_PAGE * PAGE_SIZE, REFERENCE_TSC_PAGE.size))
        assert page.sequence
        time = (guest.machine.tsc * page.scale >> 64) + page.offset
        assert guest.rdmsr(Msr.TIME_REF_COUNT) == time
        assert time >= self.last
        self.last = time
        return time

    def arm(
        self, index: int, count: int, *, periodic: bool, lazy: bool = False, direct: bool = False
    ) -> None:
        """Write the registers of a timer, COUNT last."""
        config = StimerConfig(
            enable=False,
            periodic=periodic,
            lazy=lazy,
            auto_enable=True,
            vector=DIRECT_VECTOR if direct else 0,
            direct=direct,
            sint=0 if direct else TIMER_SINT,
        )
        self.guest.wrmsr(Msr.STIMER0_CONFIG + 2 * index, STIMER_CONFIG.build(config))
        self.guest.wrmsr(Msr.STIMER0_COUNT + 2 * index, count)

    def enabled(self, index: int) -> bool:
        """Return what the timer's CONFIG says."""
        return STIMER_CONFIG.parse(self.guest.rdmsr(Msr.STIMER0_CONFIG + 2 * index)).enable

    def expired(self, late: int = 0) -> list[tuple[int, int]]:
        """Return timer and expiration of the messages since the last call; ``late``: milliseconds that were lost.

        None was delivered before its expiration, or later than the guest itself allows.
        """
        found = []
        for vcpu, each in self.guest.expired:
            assert vcpu == 0
            assert each.expiration <= each.delivery < each.expiration + (1 + late) * MS
            found.append((each.timer, each.expiration))
        self.guest.expired.clear()
        return found


def messages(guest: KilledGuest) -> list[object]:
    """One-shot and periodic timers, lazy and not, whose messages the guest takes at once, or late."""
    guest.boot()
    timers = Timers(guest)
    begun = timers.now()
    seen: list[object] = []
    timers.arm(0, begun + 2 * MS + 5, periodic=False)
    timers.arm(1, 2 * MS, periodic=True)
    timers.arm(2, 3 * MS, periodic=True, lazy=True)
    guest.sleep(0.007)
    assert timers.now() == begun + 7 * MS
    seen.append(sorted((timer, at - begun) for timer, at in timers.expired()))
    seen.append([timers.enabled(index) for index in range(3)])
    guest.machine.advance(0.004)  # the guest runs late: the lazy one has no message behind another
    guest.settle()
    seen.append([timer for timer, _ in timers.expired(4) if timer != 2])
    timers.arm(1, 0, periodic=True)
    timers.arm(2, 0, periodic=True)
    timers.arm(0, timers.now(), periodic=False)  # which is now
    guest.settle()
    seen.append(timers.expired()[-1][0])
    guest.sleep(0.004)
    seen += [timers.expired(), [timers.enabled(index) for index in range(3)]]
    return seen


def direct(guest: KilledGuest) -> list[object]:
    """Timers that interrupt without a message, each millisecond with the interrupts that came in it."""
    guest.boot()
    timers = Timers(guest)
    begun = timers.now()
    timers.arm(0, begun + 3 * MS, periodic=False, direct=True)
    ticks: list[object] = []

    def wait(milliseconds: int) -> None:
        for _ in range(milliseconds):
            guest.sleep(0.001)
            ticks.append(len(guest.ticks))
            guest.ticks.clear()

    wait(5)
    assert not timers.enabled(0)
    timers.arm(1, 2 * MS, periodic=True, direct=True)
    wait(5)
    timers.arm(1, 0, periodic=True, direct=True)
    wait(3)
    return ticks


def clock(guest: KilledGuest) -> list[object]:
    """A clock whose page becomes valid while the guest reads it; to capture the state of a host takes a while."""
    machine = guest.machine
    captured = Partition._vps_in_use
    last = 0

    def capture(partition: Partition) -> tuple[VpState, ...]:
        machine.ticks += FREQUENCY // 1000
        return captured(partition)

    def look() -> None:
        nonlocal last
        page = REFERENCE_TSC_PAGE.parse(guest.memory.read(TSC_PAGE * PAGE_SIZE, REFERENCE_TSC_PAGE.size))
        if page.sequence:
            time = (machine.tsc * page.scale >> 64) + page.offset
            assert time >= last, f"time goes back by {last - time}"
            last = time

    def read() -> None:
        nonlocal last
        before = last  # another processor reads the page meanwhile
        time = guest.rdmsr(Msr.TIME_REF_COUNT)
        assert time >= before, f"time goes back by {before - time}"
        last = max(last, time)

    for fate in machine.fates:
        fate.watch = look
    with patch.object(Partition, "_vps_in_use", capture):
        guest.boot()
        read()
        guest.wrmsr(Msr.REFERENCE_TSC, TSC_PAGE * PAGE_SIZE | 1)
        for _ in range(3):
            read()
            look()
            guest.settle()
    return []


CLOCK = Matrix(clock, 55, [], features=FEATURES)
MESSAGES = Matrix(messages, 169, [], features=FEATURES)
DIRECT = Matrix(direct, 84, [], features=FEATURES)


def test_the_sessions_have_expirations(tmp_path: Path) -> None:
    assert MESSAGES.undisturbed(tmp_path) == [
        [(0, 2 * MS + 5), (1, 2 * MS), (1, 4 * MS), (1, 6 * MS), (2, 6 * MS)],
        [False, True, True],
        [1, 1],
        0,
        [],
        [False, False, False],
    ]
    assert DIRECT.undisturbed(tmp_path) == [0, 0, 1, 0, 0, 0, 1, 0, 1, 0, 0, 0, 0]


@pytest.mark.parametrize("end", MESSAGES.each_step(5))
def test_messages_of_timers_come_once_and_in_time(tmp_path: Path, end: int) -> None:
    MESSAGES.killed_at(tmp_path, end)


@pytest.mark.parametrize(("end", "next_end"), MESSAGES.each_pair(31))
def test_also_if_the_next_emulator_is_killed_too(tmp_path: Path, end: int, next_end: int) -> None:
    MESSAGES.killed_at(tmp_path, end, next_end)


@pytest.mark.parametrize("end", CLOCK.each_step(2))
def test_time_does_not_go_back(tmp_path: Path, end: int) -> None:
    CLOCK.killed_at(tmp_path, end)


@pytest.mark.parametrize(("end", "next_end"), CLOCK.each_pair(7))
def test_time_does_not_go_back_over_two_deaths(tmp_path: Path, end: int, next_end: int) -> None:
    CLOCK.killed_at(tmp_path, end, next_end)


@pytest.mark.parametrize("end", DIRECT.each_step(3))
def test_a_timer_without_messages_interrupts_once(tmp_path: Path, end: int) -> None:
    DIRECT.killed_at(tmp_path, end)


@pytest.mark.parametrize(("end", "next_end"), DIRECT.each_pair(31))
def test_it_does_so_also_if_the_next_emulator_is_killed_too(tmp_path: Path, end: int, next_end: int) -> None:
    DIRECT.killed_at(tmp_path, end, next_end)
