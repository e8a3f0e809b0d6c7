"""A guest with two processors whose emulator is killed: both go on."""

from __future__ import annotations

from pathlib import Path

import pytest
from vmbus.hypervisor.features import Features
from vmbus.wire.gateway import TrapKind
from vmbus.wire.msr import STIMER_CONFIG, Msr, StimerConfig

from tests.unit.machine.killed.echoes import answers_to, ask, echoes
from tests.unit.machine.killed.guest import DIRECT_VECTOR, KilledGuest
from tests.unit.machine.killed.matrix import Matrix


def session(guest: KilledGuest) -> list[object]:
    guest.boot()
    first, second = (offer.relid for offer in guest.connect())
    guest.open_rings(first, vcpu=0)
    guest.open_rings(second, vcpu=1)
    both_at_once(guest, first, second)
    guest.move(first, 1)
    guest.move(second, 0)
    both_at_once(guest, first, second)
    guest.close(first)
    guest.unload()
    offers = guest.connect(vp=1)
    guest.open_rings(offers[1].relid, vcpu=1)
    echoes(guest, offers[1].relid, 2)
    return [guest.names(), guest.messages, timer_of_the_second(guest)]


def both_at_once(guest: KilledGuest, *relids: int) -> None:
    """Both processors send, execute a trap each, and go on when both have the result."""
    for number in range(3):
        for relid in relids:
            ask(guest, relid, number)
    for vcpu in (0, 1):
        guest.machine.begin_trap(TrapKind.RDMSR, vcpu, rcx=Msr.VP_INDEX)
    found = [guest.machine.end_trap(TrapKind.RDMSR, vcpu) for vcpu in (0, 1)]
    assert found == [0, 1]
    for vcpu in (1, 0):
        guest.machine.begin_trap(TrapKind.WRMSR, vcpu, rcx=Msr.SINT0 + 5, rax=0x10000 | 64 + vcpu)
    for vcpu in (0, 1):
        guest.machine.end_trap(TrapKind.WRMSR, vcpu)
        assert guest.rdmsr(Msr.SINT0 + 5, vcpu) == 0x10000 | 64 + vcpu
    guest.settle()
    for relid in relids:
        answers_to(guest, relid, 3)


def timer_of_the_second(guest: KilledGuest) -> list[int]:
    """Return where a timer of the second processor has interrupted."""
    config = StimerConfig(
        enable=False, periodic=False, lazy=False, auto_enable=True, vector=DIRECT_VECTOR, direct=True, sint=0
    )
    guest.wrmsr(Msr.STIMER0_CONFIG, STIMER_CONFIG.build(config), 1)
    guest.wrmsr(Msr.STIMER0_COUNT, guest.rdmsr(Msr.TIME_REF_COUNT, 1) + 15_000, 1)
    guest.sleep(0.003)
    return guest.ticks


SECOND = "12345678-0000-4000-8000-000000000002"
MATRIX = Matrix(
    session,
    308,
    ["echo", f"echo,instance={SECOND}"],
    vcpus=2,
    features=Features(stimer=True, stimer_direct=True),
)


def test_the_session_has_both_processors(tmp_path: Path) -> None:
    seen = MATRIX.undisturbed(tmp_path)
    offered = ["VERSION_RESPONSE", "OFFERCHANNEL", "OFFERCHANNEL", "ALLOFFERS_DELIVERED"]
    opened = ["GPADL_CREATED", "OPENCHANNEL_RESULT"]
    moved = ["MODIFYCHANNEL_RESPONSE"] * 2
    assert isinstance(seen, list)
    assert seen[0] == [*offered, *opened, *opened, *moved, "UNLOAD_RESPONSE", *offered, *opened]
    assert seen[2] == [1]


@pytest.mark.parametrize("end", MATRIX.each_step(9))
def test_both_processors_go_on(tmp_path: Path, end: int) -> None:
    MATRIX.killed_at(tmp_path, end)


@pytest.mark.parametrize(("end", "next_end"), MATRIX.each_pair(31))
def test_also_if_the_next_emulator_is_killed_too(tmp_path: Path, end: int, next_end: int) -> None:
    MATRIX.killed_at(tmp_path, end, next_end)
