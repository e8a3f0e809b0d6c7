"""Interrupts that a vCPU raises by itself before it halts: the gateway's code and the emulator's, together."""

from __future__ import annotations

import select
import time
from collections.abc import Callable
from types import SimpleNamespace

import pytest
from vmbus.machine.engine import build as engine_build
from vmbus.machine.engine.library import EngineLibrary, VcpuSignals
from vmbus.machine.qemu.qtest import LocalApics
from vmbus.wire import gateway as wire
from vmbus.wire.gateway import IdleState

from tests.guest.matrix import full
from tests.unit.gateway.gateway_harness import Harness

Launch = Callable[..., Harness]
VECTOR = 0x53
POLL_NS = 200_000_000
"""Long, so that a test that expects an end before that cannot pass by chance."""


class Idle:
    """One vCPU that is ready to poll, and both sides of the words that it shares."""

    def __init__(self, harness: Harness, *, vcpus: int = 1, poll_ns: int = POLL_NS) -> None:
        self.harness = harness
        self.gateway = harness.active()
        self.gateway.pending.set_apic_ids(range(vcpus))
        self.gateway.set_poll(poll_ns)
        library = EngineLibrary.open()
        assert library is not None
        self.signals = VcpuSignals(library, self.gateway.pending.addresses())

    def state(self, vcpu: int = 0) -> IdleState:
        return IdleState(self.word("idle", vcpu))

    def word(self, name: str, vcpu: int = 0) -> int:
        at = self.gateway._vcpu_offset + vcpu * wire.VCPU.sizeof() + wire.offset_of(wire.VCPU, name)
        return int(self.gateway._words[at // 4])

    def until(self, state: IdleState, vcpu: int = 0) -> None:
        end = time.monotonic() + 30
        while self.state(vcpu) is not state:
            assert time.monotonic() < end, self.state(vcpu)

    def woke(self) -> tuple[int, int, int]:
        """Vector, interrupts raised by the gateway so far, microseconds before the HLT itself."""
        _, vector, raised, polled = self.harness.expect("woke")
        return int(vector, 16), int(raised), int(polled)

    def signal(self, vector: int = VECTOR, vcpu: int = 0) -> bool:
        """Interrupt as the emulator does; whether it was left to the vCPU."""
        if self.signals.post(vcpu, vector):
            return True
        self.harness.send(f"interrupt {vcpu} {vector:x}")
        return False

    def teach(self) -> None:
        """One short halt that a signal ends: the next one is polled."""
        self.harness.send("halt 0")
        self.until(IdleState.HALTED)
        assert not self.signal()
        self.woke()
        assert self.word("poll_window_ns") > 0

    def polling(self, vcpu: int = 0) -> None:
        """Let a vCPU halt, until it polls: after a poll in which it lost its processor it does not, for a while."""
        end = time.monotonic() + 30
        while time.monotonic() < end:
            self.harness.send(f"halt {vcpu}")
            while self.state(vcpu) is IdleState.RUNNING:
                pass
            if self.state(vcpu) is IdleState.POLLING:
                return
            self.signal(vcpu=vcpu)
            self.woke()
            time.sleep(0.01)
        pytest.fail("the vCPU never polls")

    def polled(self, vector: int = VECTOR) -> tuple[int, int, int]:
        """Signal a vCPU while it polls; what :meth:`woke` says, and how many interrupts it raised for that."""
        for _ in range(1000):
            self.polling()
            before = self.counters()["raised"]
            left = self.signal(vector)
            woke = self.woke()
            if left:
                return woke[0], self.counters()["raised"] - before, woke[2]
        pytest.fail("it never polled when it was signalled")

    def counters(self) -> dict[str, int]:
        return self.gateway.counters()[0]


@pytest.fixture
def idle(harness: Harness) -> Idle:
    return Idle(harness)


def test_hlt_is_seen_and_only_where_it_does_not_fault(harness: Harness) -> None:
    harness.send("translate 1 0 1000 1000 90 f4")
    assert harness.expect("translated") == ["-", "hlt"]
    harness.send("translate 1 3 1000 1000 90 f4")
    assert harness.expect("translated") == ["-", "-"]


def test_a_vcpu_that_polls_raises_the_interrupt_itself(idle: Idle) -> None:
    idle.teach()
    assert idle.polled()[:2] == (VECTOR, 1)
    assert idle.gateway.pending.waiting() == []


def test_a_vcpu_that_halts_is_left_to_qemu(idle: Idle) -> None:
    idle.harness.send("halt 0")
    idle.until(IdleState.HALTED)
    assert not idle.signal()
    assert idle.woke()[:2] == (VECTOR, 0)
    assert idle.gateway.pending.waiting() == []
    assert idle.word("missed") == 1


def test_a_vcpu_that_runs_is_left_to_qemu_and_teaches_nothing(idle: Idle) -> None:
    assert idle.state() is IdleState.RUNNING
    assert not idle.signals.post(0, VECTOR)
    assert idle.gateway.pending.waiting() == []
    assert (idle.word("missed"), idle.word("passed")) == (0, 1)


@pytest.mark.parametrize("vector", [16, 63, 64, 0xF3, 255])
def test_every_vector_arrives(idle: Idle, vector: int) -> None:
    idle.teach()
    assert idle.polled(vector)[:2] == (vector, 1)


def test_several_vectors_are_raised_together(idle: Idle) -> None:
    idle.teach()
    idle.gateway._quads[idle.gateway.pending._pending_at[0]] |= 1 << 33
    idle.gateway._quads[idle.gateway.pending._pending_at[0] + 3] |= 1 << 63
    assert idle.gateway.pending.waiting() == [(0, 33), (0, 255)]
    idle.harness.send("halt 0")
    assert idle.woke()[:2] == (255, 2)
    idle.harness.send("halt 0")
    assert idle.woke()[:2] == (33, 2)


def test_what_is_pending_is_raised_before_a_hlt_that_is_not_polled(idle: Idle) -> None:
    idle.gateway.set_poll(0)
    idle.gateway._quads[idle.gateway.pending._pending_at[0] + 1] |= 1 << VECTOR - 64
    idle.harness.send("halt 0")
    assert idle.woke()[:2] == (VECTOR, 1)


def test_a_guest_that_waits_long_is_not_polled(idle: Idle) -> None:
    idle.gateway.set_poll(1_000_000)
    idle.harness.send("halt 0")
    idle.until(IdleState.HALTED)
    time.sleep(0.01)
    assert not idle.signal()
    idle.woke()
    assert idle.word("poll_window_ns") == 0


def test_polls_in_vain_get_shorter_and_end(idle: Idle) -> None:
    idle.gateway.set_poll(2_000_000)
    for _ in range(100):  # on a busy machine the first ones take longer than that
        idle.harness.send("halt 0")
        idle.until(IdleState.HALTED)
        idle.signal()
        idle.woke()
        if first := idle.word("poll_window_ns"):
            break
    assert 0 < first <= 2_000_000
    end = time.monotonic() + 30
    while time.monotonic() < end:  # a vCPU that lost its processor while it polled does not poll for a while
        time.sleep(0.005)
        idle.harness.send("halt 0")
        idle.until(IdleState.HALTED)
        idle.harness.send(f"interrupt 0 {VECTOR:x}")  # of somebody else
        idle.woke()
        if not idle.word("poll_window_ns"):
            return
    pytest.fail("it still polls")


def test_without_an_emulator_nothing_is_polled_or_raised(idle: Idle) -> None:
    idle.teach()
    idle.signals.post(0, VECTOR)
    idle.gateway._quads[idle.gateway.pending._pending_at[0]] |= 1 << 40  # one that died between two steps
    idle.gateway.close()
    time.sleep(0.05)
    idle.harness.send("halt 0")
    idle.harness.send("interrupt 0 44")
    assert idle.woke()[:2] == (0x44, 0)
    again = idle.harness.attach()
    assert again.pending.waiting() == [(0, 40)]
    again.pending.forget()
    assert again.pending.waiting() == []


def test_a_vcpu_that_cannot_be_reached_does_not_poll(idle: Idle) -> None:
    idle.teach()
    idle.gateway.pending.set_apic_ids([300])
    idle.harness.send("halt 0")
    idle.until(IdleState.HALTED)
    assert not idle.signal()
    assert idle.woke()[:2] == (VECTOR, 0)


def test_what_a_vcpu_cannot_raise_is_raised_through_qemu(idle: Idle) -> None:
    idle.harness.send("deaf 0")
    idle.harness.expect("deaf")
    idle.teach()
    assert not idle.gateway.pending.failed()
    assert idle.gateway.traps() == []
    assert not idle.gateway.sleep_prepare()
    for _ in range(1000):
        idle.polling()
        if idle.signals.post(0, VECTOR):
            break
        idle.harness.send(f"interrupt 0 {VECTOR:x}")
        idle.woke()
    assert select.select([idle.gateway.fileno()], [], [], 30)[0], "the emulator is not woken"
    assert idle.gateway.pending.failed()
    assert idle.gateway.pending.waiting() == [(0, VECTOR)]
    sent: list[tuple[int, int]] = []
    apics = LocalApics(
        SimpleNamespace(interrupt=lambda *each: sent.append(each)),  # type: ignore[arg-type]
        [0],
        lambda error: None,
        idle.signals,
    )
    apics.retry(idle.gateway.pending.waiting())
    assert sent == [(0, VECTOR)]
    assert idle.gateway.pending.waiting() == []
    assert not idle.gateway.pending.failed()
    idle.harness.send(f"interrupt 0 {VECTOR:x}")
    assert idle.woke()[0] == VECTOR


def test_reset_forgets_what_is_pending(idle: Idle) -> None:
    idle.gateway._quads[idle.gateway.pending._pending_at[0]] |= 1 << 40
    idle.gateway.forget_requests()
    assert idle.gateway.pending.waiting() == []


# --- interrupts of others ---


def test_in_xapic_mode_an_interrupt_of_anybody_ends_the_poll(idle: Idle) -> None:
    idle.teach()
    idle.polling()
    idle.harness.send("interrupt 0 44")
    vector, raised, polled = idle.woke()
    assert (vector, raised) == (0x44, 0)
    assert polled < POLL_NS // 1000 // 2


def x2apic(idle: Idle) -> None:
    idle.harness.send("x2apic 0")
    idle.harness.expect("x2apic")
    idle.teach()


def wrmsr(idle: Idle, msr: int, value: int, vcpu: int = 0) -> None:
    idle.harness.send(f"wrmsr {vcpu} {msr:x} {value:x}")
    idle.harness.expect("wrote")


@pytest.mark.parametrize(
    ("divider", "count"), [(0b1011, 20_000_000), (0b0011, 20_000_000 // 16), (0b1010, 20_000_000 // 128)]
)
def test_in_x2apic_mode_the_poll_ends_before_the_guest_s_timer(idle: Idle, divider: int, count: int) -> None:
    x2apic(idle)
    wrmsr(idle, 0x832, 0xEC)
    wrmsr(idle, 0x83E, divider)
    wrmsr(idle, 0x838, count)
    idle.harness.send("halt 0")
    idle.until(IdleState.HALTED)
    idle.harness.send("interrupt 0 ec")
    vector, _, polled = idle.woke()
    assert vector == 0xEC
    assert polled < POLL_NS // 1000 // 2


@pytest.mark.parametrize("stop", [(0x838, 0), (0x832, 0x100EC)])
def test_a_timer_that_was_stopped_ends_no_poll(idle: Idle, stop: tuple[int, int]) -> None:
    x2apic(idle)
    wrmsr(idle, 0x83E, 0b1011)
    wrmsr(idle, 0x838, 1_000_000)
    wrmsr(idle, *stop)
    time.sleep(0.002)
    assert idle.polled()[:2] == (VECTOR, 1)


def test_a_periodic_timer_is_due_again_and_again(idle: Idle) -> None:
    x2apic(idle)
    wrmsr(idle, 0x832, 0x200EC)
    wrmsr(idle, 0x83E, 0b1011)
    wrmsr(idle, 0x838, 5_000_000)
    time.sleep(0.03)
    for _ in range(3):
        idle.harness.send("halt 0")
        idle.until(IdleState.HALTED)
        assert not idle.signal()
        assert idle.woke()[2] < POLL_NS // 1000 // 2


def test_in_x2apic_mode_an_interrupt_on_its_way_through_qemu_is_not_polled_for(idle: Idle) -> None:
    x2apic(idle)
    assert idle.state() is IdleState.RUNNING
    polls = idle.counters()["polls"]
    assert not idle.signals.post(0, VECTOR)  # and to QEMU, which is slower than the vCPU
    idle.harness.send("halt 0")
    idle.until(IdleState.HALTED)
    assert idle.counters()["polls"] == polls
    idle.harness.send(f"interrupt 0 {VECTOR:x}")
    assert idle.woke()[:2] == (VECTOR, 0)
    assert idle.polled()[:2] == (VECTOR, 1)


@pytest.mark.parametrize("value", [1 << 32 | 0xFD, 0xC00FD, 0x00010001 << 32 | 0x8FD, 0xC08FD])
def test_an_interrupt_from_another_vcpu_ends_the_poll(launch: Launch, value: int) -> None:
    idle = Idle(launch(vcpus=2), vcpus=2)
    harness = idle.harness
    for vcpu in (0, 1):
        harness.send(f"x2apic {vcpu}")
        harness.expect("x2apic")
    harness.send("halt 1")
    idle.until(IdleState.HALTED, 1)
    assert not idle.signal(vcpu=1)
    idle.woke()
    idle.polling(1)
    wrmsr(idle, 0x830, value)
    idle.until(IdleState.HALTED, 1)
    harness.send("interrupt 1 fd")
    vector, _, polled = idle.woke()
    assert vector == 0xFD
    assert polled < POLL_NS // 1000


def test_an_interrupt_for_another_vcpu_does_not(launch: Launch) -> None:
    idle = Idle(launch(vcpus=2), vcpus=2)
    for vcpu in (0, 1):
        idle.harness.send(f"x2apic {vcpu}")
        idle.harness.expect("x2apic")
    idle.teach()
    wrmsr(idle, 0x830, 1 << 32 | 0xFD, vcpu=1)
    assert idle.polled()[:2] == (VECTOR, 1)


# --- many ---


@pytest.mark.timeout(4 * 3600)
@pytest.mark.parametrize("count", [20_000, full(50_000_000)])
@pytest.mark.parametrize("vcpus", [1, 2, 4])
def test_no_signal_is_lost(launch: Launch, vcpus: int, count: int) -> None:
    """Of two threads; ``count`` signals of each."""
    idle = Idle(launch(vcpus=vcpus), vcpus=vcpus, poll_ns=300_000)
    idle.harness.send(f"stress 2 6 {count}")
    signals, raised, _sent, lost = map(int, idle.harness.expect("stressed", 60 + count / 5_000))
    assert (signals, lost) == (2 * count, 0)
    assert raised > 0, "the vCPUs never polled: nothing was tested"
    assert idle.gateway.pending.waiting() == []


def test_gateway_and_engine_give_the_states_the_same_numbers() -> None:
    text = (engine_build.SOURCE / "signals.h").read_text()
    for state in IdleState:
        assert f"VCPU_{state.name} = {state.value}" in text
