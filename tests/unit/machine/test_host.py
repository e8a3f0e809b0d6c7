"""The host between the gateway and the partition: every trap is answered, whatever happens."""

from __future__ import annotations

import asyncio
import logging
from types import SimpleNamespace
from typing import Any

import pytest
from vmbus.errors import GatewayError, InternalError, QemuError, QemuGone
from vmbus.hypervisor import GeneralProtection, UndefinedOpcode
from vmbus.hypervisor.hypercalls import AcknowledgedEarly, HypercallResult
from vmbus.machine.gateway.traps import Fault, Trap
from vmbus.machine.gateway_service import GatewayService
from vmbus.machine.host import ExitReason, Host
from vmbus.machine.migration.state_machine import Phase
from vmbus.machine.qemu.qtest import LocalApics
from vmbus.wire.gateway import TrapKind
from vmbus.wire.hypercall import HvStatus


class Recorder:
    """A gateway that writes down the answers."""

    def __init__(self) -> None:
        self.answers: list[object] = []

    def answer(self, trap: Trap, value: int = 0) -> None:
        self.answers.append(value)

    def answer_fault(self, trap: Trap, fault: Fault) -> None:
        self.answers.append(fault)


def service_of(gateway: Recorder, partition: SimpleNamespace, bus: object = None) -> GatewayService:
    parts = SimpleNamespace(partition=partition, bus=bus)
    return GatewayService(SimpleNamespace(), gateway, parts, SimpleNamespace())  # type: ignore[arg-type]


def serve(kind: TrapKind, outcome: int | Exception) -> list[object]:
    """What the guest gets when the partition returns or raises ``outcome``."""

    def act(*_: object) -> Any:
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    recorder = Recorder()
    partition = SimpleNamespace(
        read_msr=act, write_msr=act, hypercall=lambda *_: HypercallResult(act()), hypercalls_enabled=True
    )
    service_of(recorder, partition).answer(Trap(0, 0, 1, kind, True, *[0] * 10))
    return recorder.answers


@pytest.mark.parametrize(
    ("kind", "outcome", "answer"),
    [
        (TrapKind.RDMSR, 0x1234, 0x1234),
        (TrapKind.WRMSR, 0x1234, 0),
        (TrapKind.VMCALL, 0x13, 0x13),
        (TrapKind.RDMSR, GeneralProtection("unknown-msr"), Fault.GP),
        (TrapKind.WRMSR, GeneralProtection("read-only-msr"), Fault.GP),
        (TrapKind.VMCALL, UndefinedOpcode("hypercall-page-not-enabled"), Fault.UD),
    ],
)
def test_a_trap_gets_what_the_partition_says(
    kind: TrapKind, outcome: int | Exception, answer: object
) -> None:
    assert serve(kind, outcome) == [answer]


@pytest.mark.parametrize("bug", [InternalError("x"), ZeroDivisionError(), KeyError("x")])
@pytest.mark.parametrize(
    ("kind", "answer"),
    [
        (TrapKind.RDMSR, Fault.GP),
        (TrapKind.WRMSR, Fault.GP),
        (TrapKind.VMCALL, HvStatus.OPERATION_FAILED),
    ],
)
def test_a_bug_costs_the_guest_an_error_and_is_logged(
    caplog: pytest.LogCaptureFixture, kind: TrapKind, answer: object, bug: Exception
) -> None:
    with caplog.at_level(logging.ERROR):
        assert serve(kind, bug) == [answer]
    assert "please report" in caplog.text


def test_an_interrupt_after_qemus_end_is_told_once_and_raises_nothing() -> None:
    def closed(*_: object) -> None:
        raise QemuGone("closed")

    told: list[QemuGone] = []
    apics = LocalApics(SimpleNamespace(interrupt=closed), [0], told.append)  # type: ignore[arg-type]
    apics.request(0, 0xF3)
    assert len(told) == 1


@pytest.mark.parametrize("polls", [True, False])
def test_an_interrupt_goes_to_a_vcpu_that_polls_or_through_qemu(polls: bool) -> None:
    sent: list[tuple[int, int]] = []
    posted: list[tuple[int, int]] = []
    apics = LocalApics(
        SimpleNamespace(interrupt=lambda *each: sent.append(each)),  # type: ignore[arg-type]
        [4, 8],
        lambda error: None,
        SimpleNamespace(post=lambda *each: posted.append(each) or polls),  # type: ignore[func-returns-value]
    )
    apics.request(1, 0xF3)
    assert posted == [(1, 0xF3)]
    assert sent == ([] if polls else [(8, 0xF3)])
    assert apics.requests == 1


async def test_how_a_guest_ended_is_told_by_qmp_and_not_by_the_socket_that_broke_first() -> None:
    async def exit_reason(*, shut_down: bool) -> ExitReason:
        loop = asyncio.get_running_loop()
        host = Host.__new__(Host)
        host._loop = loop
        host._lost_because = None
        host._shutdown_reason = "guest-shutdown" if shut_down else None
        host._ended = loop.create_future()
        host.migration = SimpleNamespace(phase=Phase.IDLE)  # type: ignore[assignment]
        host.gateway = SimpleNamespace(fileno=lambda: 0)  # type: ignore[assignment]
        host.leave_gateway = lambda: None  # type: ignore[method-assign]
        host._lost(QemuGone("broken pipe"))
        host._lost(QemuGone("another"))
        if not shut_down:
            assert not host._ended.done(), "QMP may still say that the guest shut down"
            host._ended_by_itself(None)
        return await host.serve()

    assert await exit_reason(shut_down=True) is ExitReason.POWERED_OFF
    assert await exit_reason(shut_down=False) is ExitReason.QEMU_GONE


async def test_a_command_that_qemu_refuses_in_the_background_costs_no_guest(
    caplog: pytest.LogCaptureFixture,
) -> None:
    host = Host.__new__(Host)
    host._loop = asyncio.get_running_loop()
    host._ended = host._loop.create_future()
    host._tasks = set()
    host.leave_gateway = lambda: None  # type: ignore[method-assign]

    async def refused() -> None:
        raise QemuError("QEMU refused system_reset: no")

    await asyncio.wait({host.background(refused())})
    await asyncio.sleep(0)
    assert not host._ended.done()
    assert "QEMU refused system_reset: no" in caplog.text

    async def broken() -> None:
        raise GatewayError("another version")

    await asyncio.wait({host.background(broken())})
    assert await host.serve() is ExitReason.QEMU_GONE


class SlowBus:
    """A bus that acknowledges everything early, and may fail when it acts."""

    def __init__(self, order: list[object], bug: Exception | None) -> None:
        self.order = order
        self.bug = bug

    def can_acknowledge_early(self, payload: bytes) -> bool:
        return True

    def handle_acknowledged(self, connection_id: int, payload: bytes) -> None:
        self.order.append((connection_id, payload))
        if self.bug is not None:
            raise self.bug


@pytest.mark.parametrize("bug", [None, KeyError("x")])
def test_an_acknowledged_message_is_answered_first_and_acted_on_next(bug: Exception | None) -> None:
    recorder = Recorder()

    def hypercall(*_: object) -> HypercallResult:
        accepted = service.message(0, 1, b"message")
        assert isinstance(accepted, AcknowledgedEarly)
        return HypercallResult(HvStatus.SUCCESS, accepted.act)

    service = service_of(recorder, SimpleNamespace(hypercall=hypercall), SlowBus(recorder.answers, bug))
    for _ in range(2):
        service.answer(Trap(0, 0, 1, TrapKind.VMCALL, True, *[0] * 10))
    assert recorder.answers == [HvStatus.SUCCESS, (1, b"message")] * 2


@pytest.mark.parametrize("able", [True, False])
def test_a_processor_that_can_take_signals_again_is_signalled_for_every_channel_of_its(able: bool) -> None:
    signalled: list[int] = []

    def channel(number: int, vp: int | None) -> SimpleNamespace:
        return SimpleNamespace(target_vp=vp, signal_guest=lambda: signalled.append(number), endpoint=None)

    host = Host.__new__(Host)
    vps = [SimpleNamespace(can_signal=lambda sint: able and sint == 2)] * 2
    host.partition = SimpleNamespace(synic=SimpleNamespace(vps=vps))  # type: ignore[assignment]
    host.bus = SimpleNamespace(channels=[channel(1, 1), channel(2, 0), channel(3, None), channel(4, 1)])  # type: ignore[assignment]
    Host._Events(host).synic_changed(1)
    assert signalled == ([1, 4] if able else [])


async def test_a_guest_that_asks_for_a_reset_in_a_loop_makes_one_task() -> None:
    host = Host.__new__(Host)
    host._loop = asyncio.get_running_loop()
    host._ended = host._loop.create_future()
    host._tasks = set()
    gate, commands = asyncio.Event(), []

    async def execute(command: str, arguments: Any = None) -> None:
        commands.append(command)
        await gate.wait()

    host.qmp = SimpleNamespace(execute=execute)  # type: ignore[assignment]
    events = Host._Events(host)
    for _ in range(1000):
        events.reset_requested()
    await asyncio.sleep(0)
    assert commands == ["system_reset"]
    assert len(host._tasks) == 1
    gate.set()
    await asyncio.gather(*host._tasks)
    events.reset_requested()  # of the guest that runs then
    await asyncio.gather(*host._tasks)
    assert commands == ["system_reset"] * 2
