"""Arbitrary accesses of a guest end with a value, #GP or #UD, and have no other effect on the host."""

from __future__ import annotations

import contextlib

from hypothesis import given, settings
from hypothesis import strategies as st
from vmbus.hypervisor import Features, GeneralProtection, HypercallRegisters, UndefinedOpcode
from vmbus.wire.hypercall import HvStatus
from vmbus.wire.msr import Msr

from tests.unit.hypervisor.scripted_guest import RAM_SIZE, ScriptedGuest

EVERYTHING = Features(vp_runtime=True, stimer=True, stimer_direct=True)
NUMBERS = ScriptedGuest(features=EVERYTHING).partition.msr_numbers

u64 = st.integers(0, (1 << 64) - 1)
page_values = st.builds(
    lambda gpn, low: gpn << 12 | low, st.integers(0, RAM_SIZE // 4096 + 1), st.sampled_from([0, 1, 3, 0xFFF])
)
values = st.one_of(
    u64,
    page_values,
    st.sampled_from([0, 1, 0xF3, 0x100F3, 0x200F3, 0x400F3, 0x2F0ED, 0x2000F, 3 << 62, (1 << 64) - 1]),
)
msrs = st.one_of(st.sampled_from(NUMBERS), st.integers(0x40000000, 0x40001100), st.integers(0, 0xFFFFFFFF))
vps = st.integers(0, 1)
controls = st.one_of(u64, st.sampled_from([0x5C, 0x5D, 0x1005C, 0x1005D, 8, 0x8001, 0x5C | 1 << 31]))
addresses = st.one_of(
    u64, st.integers(0, RAM_SIZE + 4096), st.integers(0, RAM_SIZE // 8).map(lambda n: n * 8)
)

operations = st.one_of(
    st.tuples(st.just("rd"), vps, msrs),
    st.tuples(st.just("wr"), vps, msrs, values),
    st.tuples(st.just("call"), vps, st.booleans(), controls, addresses, u64),
    st.tuples(st.just("poke"), st.integers(0, RAM_SIZE - 256), st.binary(max_size=256)),
    st.tuples(st.just("post"), vps, st.integers(0, 15), st.binary(max_size=240)),
    st.tuples(st.just("event"), vps, st.integers(0, 15), st.integers(0, 2047)),
    st.tuples(st.just("time"), st.sampled_from([0.0001, 0.001, 0.01])),
    st.tuples(st.just("migrate")),
    st.tuples(st.just("reset")),
)


class HostileGuest(ScriptedGuest):
    def do(self, name: str, *arguments: object) -> None:
        getattr(self, f"do_{name}")(*arguments)

    def do_rd(self, vp: int, msr: int) -> None:
        with contextlib.suppress(GeneralProtection):
            value = self.rd(msr, vp)
            assert 0 <= value < 1 << 64

    def do_wr(self, vp: int, msr: int, value: int) -> None:
        with contextlib.suppress(GeneralProtection):
            self.wr(msr, value, vp)

    def do_call(self, vp: int, long: bool, control: int, first: int, second: int) -> None:
        low = 0xFFFFFFFF
        registers = HypercallRegisters(
            long_mode=long,
            rax=control & low,
            rbx=first >> 32,
            rcx=control if long else first & low,
            rdx=first if long else control >> 32,
            rsi=second & low,
            rdi=second >> 32,
            r8=second,
        )
        with contextlib.suppress(UndefinedOpcode):
            assert self.partition.hypercall(vp, registers).value in {int(status) for status in HvStatus}

    def do_poke(self, gpa: int, data: bytes) -> None:
        self.memory.write(gpa, data)

    def do_post(self, vp: int, sint: int, payload: bytes) -> None:
        self.synic.post_message(vp, sint, payload)

    def do_event(self, vp: int, sint: int, flag: int) -> None:
        self.synic.signal_event(vp, sint, flag)

    def do_time(self, seconds: float) -> None:
        self.timers.advance(seconds)

    def do_migrate(self) -> None:
        self.partition.pause()
        state = self.partition.save()
        self.move_to(self.make_partition())
        self.connect()
        self.partition.restore(state)
        assert self.partition.save().vps == state.vps
        self.partition.resume()

    def do_reset(self) -> None:
        self.partition.reset()

    def connect(self) -> None:
        self.partition.connect_message_port(1, lambda vp, _, payload: self.synic.post_message(vp, 2, payload))
        self.synic.connect_event_port(2, lambda: self.synic.signal_event(0, 2, 1))


@settings(deadline=None, max_examples=300)
@given(st.lists(operations, max_size=40), st.booleans())
def test_any_sequence_of_traps_raises_nothing_but_guest_faults(
    sequence: list[tuple[object, ...]], prepared: bool
) -> None:
    guest = HostileGuest(vps=2, features=EVERYTHING)
    guest.connect()
    if prepared:
        guest.enable_hypercalls()
        guest.enable_synic(0)
        guest.enable_synic(1)
    for name, *arguments in sequence:
        assert isinstance(name, str)
        guest.do(name, *arguments)
    guest.partition.status()


@settings(deadline=None, max_examples=200)
@given(
    st.lists(
        st.tuples(st.sampled_from([Msr.SIMP, Msr.SIEFP, Msr.SCONTROL, Msr.SINT0 + 2]), values), max_size=12
    )
)
def test_no_page_but_the_enabled_ones_is_written(writes: list[tuple[int, int]]) -> None:
    """Shadow of all RAM: only pages that SIMP or SIEFP named while enabled may change."""
    guest = ScriptedGuest()
    guest.memory.write(0, b"\x5a" * RAM_SIZE)
    named = set()
    for msr, value in writes:
        with contextlib.suppress(GeneralProtection):
            guest.wr(msr, value)
            if msr in (Msr.SIMP, Msr.SIEFP) and value & 1:
                named.add(value >> 12)
        guest.synic.post_message(0, 2, b"m" * 240)
        guest.synic.signal_event(0, 2, 2047)
        guest.timers.advance(1)
    for page in range(RAM_SIZE // 4096):
        if page not in named:
            assert guest.memory.read(page * 4096, 4096) == b"\x5a" * 4096
