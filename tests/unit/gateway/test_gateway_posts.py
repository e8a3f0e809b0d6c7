"""Posts: traps that the compiled gateway answers at once, and what the emulator finds of them."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

import pytest
from vmbus.errors import GatewayError
from vmbus.hypervisor.features import Features
from vmbus.hypervisor.hypercalls import HypercallRegisters, Hypercalls
from vmbus.machine.gateway.client import Gateway
from vmbus.machine.gateway.posts import Post, PostRing, ram_ranges
from vmbus.machine.gateway.traps import Trap
from vmbus.machine.memory import RamRegion
from vmbus.refusals import Refusals
from vmbus.testing.fakes import FakeMemory
from vmbus.wire import gateway as wire
from vmbus.wire.gateway import DoorbellRule, RamRange, TrapKind
from vmbus.wire.hypercall import POST_MESSAGE_INPUT, HvStatus, PostMessageInput

from tests.unit.gateway.gateway_harness import LIMIT, MSR, RAM, RDMSR, VMCALL, WRMSR, Harness, traps, work

Launch = Callable[..., Harness]

CONTROL = 0x5C
EOM = 0x40000084
MESSAGE = 8
"""The number of a message that may be posted."""
INPUT = RAM.start + 0x1000


def hypercalls(memory: FakeMemory | None = None) -> Hypercalls:
    made = Hypercalls(
        memory or FakeMemory(RAM.stop), Features(), {}, Refusals("partition", logging.getLogger(__name__))
    )
    for connection in (1, 4):
        made.message_ports[connection] = lambda vp, connection_id, payload: HvStatus.SUCCESS
    return made


def message(number: int = MESSAGE, connection: int = 1, **fields: int) -> bytes:
    """The input of HvPostMessage; ``size`` and ``kind`` may be wrong."""
    payload = number.to_bytes(4, "little") + bytes(range(4, 16))
    size = fields.pop("size", len(payload))
    kind = fields.pop("kind", 1)
    assert not fields
    data = POST_MESSAGE_INPUT.build(PostMessageInput(connection, kind, 16, payload.ljust(240, b"\xa5")))
    return data[:12] + size.to_bytes(4, "little") + data[16:]


def prepared(harness: Harness, *, takeover: bool = False) -> Gateway:
    """An emulator that has said what may be posted, and has not promised anything."""
    gateway = harness.attach(takeover=takeover)
    gateway.set_posts(hypercalls().post_rule([MESSAGE, 9], EOM), [RamRange(RAM.start, len(RAM))])
    gateway.activate()
    return gateway


def post(harness: Harness, vcpu: int = 0, **registers: int) -> int:
    """HvPostMessage that the gateway answers by itself; its result."""
    done = harness.run(VMCALL, vcpu, **{"rcx": CONTROL, "rdx": INPUT, "rax": 0xBAD, **registers})
    assert done.how == "stepped"
    return done.rax


def trapped(gateway: Gateway, count: int = 1) -> list[Trap]:
    return traps(gateway, count)


def test_a_promised_message_has_its_result_before_the_emulator_sees_it(harness: Harness) -> None:
    gateway = prepared(harness)
    gateway.posts.promise(2)
    harness.store(INPUT, message())
    assert post(harness) == HvStatus.SUCCESS
    harness.store(INPUT, message(9, 4))
    assert post(harness) == HvStatus.SUCCESS
    assert not gateway.sleep_prepare() or gateway.posts.waiting
    first, second = gateway.posts.take()
    assert first == Post(0, TrapKind.VMCALL, 1, message()[16:32])
    assert second == Post(0, TrapKind.VMCALL, 4, message(9)[16:32])
    assert gateway.posts.take() == [] and not gateway.posts.waiting
    assert gateway.traps() == []
    assert gateway.counters()[0]["posts"] == 2


def test_a_post_wakes_an_emulator_that_sleeps(harness: Harness) -> None:
    gateway = prepared(harness)
    gateway.posts.promise(1)
    harness.store(INPUT, message())
    while gateway.sleep_prepare():
        gateway.traps()
    harness.start(VMCALL, rcx=CONTROL, rdx=INPUT)
    found: list[Post] = []

    def posted() -> bool:
        found.extend(gateway.posts.take())
        return bool(found)

    work(gateway, until=posted, answer=lambda trap: pytest.fail(f"{trap}"))
    harness.done()


def test_32_bit_code_posts_from_its_own_registers(harness: Harness) -> None:
    gateway = prepared(harness)
    gateway.posts.promise(1)
    harness.store(INPUT, message())
    done = harness.run(VMCALL, bits=32, pc=0x1000, rax=CONTROL, rdx=0, rbx=0, rcx=INPUT)
    assert (done.rax, done.rdx) == (0, 0)
    assert [each.connection_id for each in gateway.posts.take()] == [1]


Input = tuple[dict[str, int], dict[str, int]]
"""Fields of :func:`message`, and registers."""

CERTAIN: dict[str, Input] = {
    "aligned": ({}, {}),
    "the last of a page": ({}, {"rdx": INPUT + 4096 - 256}),
    "all bytes": ({"size": 240}, {}),
    "only a number": ({"size": 4}, {}),
    "connection 4": ({"connection": 4}, {}),
}
UNCERTAIN: dict[str, Input] = {
    "a fast call": ({}, {"rcx": 0x1005C}),
    "a repeated call": ({}, {"rcx": CONTROL | 1 << 32}),
    "another call": ({}, {"rcx": 0x5D}),
    "not aligned": ({}, {"rdx": INPUT + 4}),
    "across pages": ({}, {"rdx": INPUT + 4096 - 248}),
    "before RAM": ({}, {"rdx": RAM.start - 256}),
    "behind RAM": ({}, {"rdx": RAM.stop}),
    "the end of all addresses": ({}, {"rdx": (1 << 64) - 256}),
    "connection 2": ({"connection": 2}, {}),
    "connection 33": ({"connection": 33}, {}),
    "connection 2^31": ({"connection": 1 << 31}, {}),
    "type 0": ({"kind": 0}, {}),
    "type with bit 31": ({"kind": 1 << 31 | 1}, {}),
    "too long": ({"size": 241}, {}),
    "much too long": ({"size": 0xFFFFFFFF}, {}),
    "without a number": ({"size": 3}, {}),
    "another message": ({"number": 14}, {}),
    "message 64 + 8": ({"number": 72}, {}),
    "message 2^32 - 1": ({"number": 0xFFFFFFFF}, {}),
}


@pytest.mark.parametrize("name", [*CERTAIN, *UNCERTAIN])
def test_only_what_the_emulator_would_accept_is_posted(harness: Harness, name: str) -> None:
    """Whatever is posted, the hypervisor part would have answered with success."""
    gateway = prepared(harness)
    gateway.posts.promise(1)
    fields, registers = (CERTAIN | UNCERTAIN)[name]
    registers = {"rcx": CONTROL, "rdx": INPUT, **registers}
    data, memory = message(**fields), FakeMemory(RAM.stop)
    at = registers["rdx"]
    for address in {INPUT, at} & set(range(RAM.start, RAM.stop - 255)):
        harness.store(address, data)
        memory.write(address, data)
    harness.start(VMCALL, **registers)
    if name in CERTAIN:
        assert harness.done().rax == 0
        assert len(gateway.posts.take()) == 1
        made = hypercalls(memory).call(0, HypercallRegisters(True, **registers))
        assert made.value == HvStatus.SUCCESS
    else:
        (trap,) = trapped(gateway)
        assert gateway.posts.take() == []
        gateway.answer(trap, 0x77)
        assert harness.done().rax == 0x77


def test_user_code_posts_nothing(harness: Harness) -> None:
    gateway = prepared(harness)
    gateway.posts.promise(1)
    harness.store(INPUT, message())
    assert harness.run(VMCALL, cpl=3, rcx=CONTROL, rdx=INPUT).how == "native"
    assert gateway.posts.take() == []


def test_eom_needs_no_promised_message(harness: Harness) -> None:
    gateway = prepared(harness)
    gateway.posts.promise(0)
    assert harness.run(WRMSR, rcx=EOM, rax=7, rdx=9).how == "stepped"
    assert gateway.posts.take() == [Post(0, TrapKind.WRMSR, 0, b"")]
    gateway.posts.withdraw()
    harness.start(WRMSR, rcx=EOM)
    (trap,) = trapped(gateway)
    gateway.answer(trap)
    harness.done()


def test_a_message_beyond_the_promise_waits_as_a_request(harness: Harness) -> None:
    gateway = prepared(harness)
    gateway.posts.promise(3)
    harness.store(INPUT, message())
    for _ in range(3):
        assert post(harness) == 0
    harness.start(VMCALL, rcx=CONTROL, rdx=INPUT)
    (trap,) = trapped(gateway)
    assert len(gateway.posts.take()) == 3
    gateway.answer(trap, 0x13)
    assert harness.done().rax == 0x13
    gateway.posts.promise(1)  # beyond what was taken
    assert post(harness) == 0


def test_a_full_ring_makes_requests_until_the_emulator_has_taken_some(harness: Harness) -> None:
    gateway = prepared(harness)
    gateway.posts.promise(1000)
    harness.store(INPUT, message())
    for _ in range(wire.POSTS - 1):
        assert post(harness) == 0
    assert harness.run(WRMSR, rcx=EOM).how == "stepped"
    harness.start(WRMSR, rcx=EOM)
    (trap,) = trapped(gateway)
    gateway.answer(trap)
    harness.done()
    assert gateway.counters()[0]["posts_held"] == 1
    kinds = [each.kind for each in gateway.posts.take()]
    assert kinds == [TrapKind.VMCALL] * (wire.POSTS - 1) + [TrapKind.WRMSR]
    gateway.posts.promise(1000)
    assert post(harness) == 0


def test_a_request_that_is_repeated_is_not_posted_too(harness: Harness) -> None:
    """It waits because there was no room; when there is, its vCPU has made the request already."""
    gateway = prepared(harness)
    harness.store(INPUT, message())
    harness.start(VMCALL, rcx=CONTROL, rdx=INPUT)
    (trap,) = trapped(gateway)
    gateway.posts.promise(64)
    before = gateway.counters()[0]["retries"]
    end = time.monotonic() + LIMIT
    while gateway.counters()[0]["retries"] < before + 3:
        assert time.monotonic() < end
        time.sleep(0.001)
    assert gateway.posts.take() == []
    gateway.answer(trap, 0x55)
    assert harness.done().rax == 0x55
    assert gateway.posts.take() == []


def test_a_withdrawn_promise_and_one_of_nobody_make_requests(harness: Harness) -> None:
    gateway = prepared(harness)
    harness.store(INPUT, message())
    for withdrawn in (False, True):
        if withdrawn:
            gateway.posts.promise(8)
            gateway.posts.withdraw()
        harness.start(VMCALL, rcx=CONTROL, rdx=INPUT)
        (trap,) = trapped(gateway)
        gateway.answer(trap, 2)
        assert harness.done().rax == 2
    assert gateway.posts.take() == []


def test_what_is_posted_is_seen_before_later_traps_and_doorbells(harness: Harness) -> None:
    gateway = prepared(harness)
    gateway.set_doorbells([DoorbellRule(0x1005D, 0x2000, 16, 0)])
    gateway.posts.promise(8)
    harness.store(INPUT, message())
    assert post(harness) == 0
    harness.start(RDMSR, rcx=MSR)
    (trap,) = trapped(gateway)
    assert len(gateway.posts.take()) == 1
    gateway.answer(trap, 1)
    harness.done()
    assert post(harness) == 0
    harness.run(VMCALL, rcx=0x1005D, rdx=0x2003)
    assert gateway.doorbells() == [3]
    assert len(gateway.posts.take()) == 1


def test_a_reset_forgets_what_was_posted_and_counts_it(harness: Harness) -> None:
    gateway = prepared(harness)
    gateway.posts.promise(2)
    harness.store(INPUT, message())
    post(harness), post(harness)
    gateway.forget_requests()
    assert gateway.posts.take() == []
    gateway.posts.promise(1)
    assert post(harness) == 0
    harness.start(VMCALL, rcx=CONTROL, rdx=INPUT)
    (trap,) = trapped(gateway)
    gateway.answer(trap, 3)
    assert harness.done().rax == 3


def test_the_next_emulator_sees_no_old_posts_and_owes_no_old_promise(harness: Harness) -> None:
    first = prepared(harness)
    first.posts.promise(8)
    harness.store(INPUT, message())
    post(harness)
    first.close()
    end = time.monotonic() + LIMIT
    while True:  # until the gateway knows that it is gone
        try:
            second = prepared(harness)
            break
        except GatewayError:
            assert time.monotonic() < end
    assert second.posts.take() == []
    harness.start(VMCALL, rcx=CONTROL, rdx=INPUT)
    (trap,) = trapped(second)
    second.answer(trap, 4)
    assert harness.done().rax == 4
    second.posts.promise(1)
    assert post(harness) == 0
    assert len(second.posts.take()) == 1


def test_another_process_of_the_same_attachment_continues_where_the_first_stopped(harness: Harness) -> None:
    gateway = prepared(harness)
    gateway.posts.promise(8)
    harness.store(INPUT, message())
    post(harness), post(harness)
    assert len(gateway.posts.take()) == 2
    gateway.posts.promise(8)
    harness.run(WRMSR, rcx=EOM)
    gateway.posts.withdraw()
    offset = gateway.posts._entries_at - wire.offset_of(wire.POST_RING, "entries")
    successor = PostRing(gateway._region, gateway._quads, offset, 1, gateway._owner)
    successor.begin()
    assert [each.kind for each in successor.take()] == [TrapKind.WRMSR]
    successor.promise(1)
    assert post(harness) == 0
    assert len(successor.take()) == 1


def test_a_late_store_of_an_emulator_that_was_replaced_brings_nothing_back(harness: Harness) -> None:
    first = prepared(harness)
    first.posts.promise(8)
    harness.store(INPUT, message())
    post(harness)
    second = prepared(harness, takeover=True)
    first.posts.withdraw()  # stores its own tail
    second.posts.begin()
    assert second.posts.take() == []
    second.posts.promise(64)
    for _ in range(wire.POSTS):
        assert post(harness) == 0
    assert len(second.posts.take()) == wire.POSTS


def test_without_an_emulator_nothing_is_posted(harness: Harness) -> None:
    first = prepared(harness)
    first.posts.promise(8)
    harness.store(INPUT, message())
    first.close()
    second = harness.attach()  # it is not active
    harness.start(VMCALL, rcx=CONTROL, rdx=INPUT)
    (trap,) = trapped(second)
    second.answer(trap, 6)
    assert harness.done().rax == 6


def test_a_promise_of_an_emulator_that_was_replaced_is_void(harness: Harness) -> None:
    first = prepared(harness)
    second = prepared(harness, takeover=True)
    first.posts.promise(8)
    harness.store(INPUT, message())
    harness.start(VMCALL, rcx=CONTROL, rdx=INPUT)
    (trap,) = trapped(second)
    second.answer(trap, 5)
    assert harness.done().rax == 5


def test_messages_of_many_vcpus_are_neither_lost_nor_reordered(launch: Launch) -> None:
    """Some are posted, the others wait as requests, and both are in one order."""
    vcpus, count = 4, 2000
    harness = launch(vcpus=vcpus)
    gateway = prepared(harness)
    for vcpu in range(vcpus):
        harness.store(RAM.start + vcpu * 4096, message(size=240))
    for vcpu in range(vcpus):
        harness.send(f"burst {vcpu} {count} {RAM.start + vcpu * 4096:x}")
    seen: list[list[int]] = [[] for _ in range(vcpus)]
    requests = 0
    sums: list[int] = []
    end = time.monotonic() + LIMIT
    while len(sums) < vcpus:
        assert time.monotonic() < end
        found = gateway.traps()
        for each in gateway.posts.take():
            seen[each.vcpu].append(int.from_bytes(each.payload[236:], "little"))
        for trap in found:
            seen[trap.vcpu].append(trap.rsi)
            gateway.answer(trap, 0)
            requests += 1
        gateway.posts.promise(sum(map(len, seen)) % 7 * 5)
        while not harness.silent():
            sums.append(int(harness.expect("burst")[1], 16))
    for each in gateway.posts.take():
        seen[each.vcpu].append(int.from_bytes(each.payload[236:], "little"))
    assert seen == [list(range(count))] * vcpus
    assert sums == [0] * vcpus
    posts = sum(each["posts"] for each in gateway.counters())
    assert posts + requests == vcpus * count
    assert posts and requests


def damage(gateway: Gateway, field: str, value: int, entry: int | None = None) -> None:
    offset = gateway.posts._entries_at - wire.offset_of(wire.POST_RING, "entries")
    if entry is None:
        at, size = offset + wire.offset_of(wire.POST_RING, field), 8
    else:
        at, size = gateway.posts._entries_at + entry * wire.POST_SIZE + wire.offset_of(wire.POST, field), 4
    gateway._region[at : at + size] = value.to_bytes(size, "little")


@pytest.mark.parametrize(
    ("field", "value", "entry"),
    [
        ("head", wire.POSTS + 2, None),
        ("head", (1 << 64) - 1, None),
        ("head", 0, None),
        ("kind", 0, 0),
        ("kind", TrapKind.RDMSR, 0),
        ("vcpu", 1, 0),
        ("vcpu", 0xFFFFFFFF, 0),
        ("size", wire.POST_PAYLOAD + 1, 0),
        ("size", 0xFFFFFFFF, 0),
    ],
)
def test_a_damaged_ring_is_the_fault_of_the_gateway(
    harness: Harness, field: str, value: int, entry: int | None
) -> None:
    gateway = prepared(harness)
    gateway.posts.promise(8)
    harness.store(INPUT, message())
    if field == "head" and value == 0:
        post(harness)
        gateway.posts.take()
    post(harness)
    damage(gateway, field, value, entry)
    with pytest.raises(GatewayError, match="posted"):
        gateway.posts.take()


@pytest.mark.parametrize("tail", [1 << 40, (1 << 64) - 65, (1 << 64) - 1])
def test_a_tail_that_cannot_be_makes_requests(harness: Harness, tail: int) -> None:
    gateway = prepared(harness)
    gateway.posts.promise(8)
    damage(gateway, "tail", tail)
    harness.store(INPUT, message())
    if tail == (1 << 64) - 1:  # 1 is in the ring, as far as the gateway knows
        assert post(harness) == 0
        return
    harness.start(VMCALL, rcx=CONTROL, rdx=INPUT)
    (trap,) = trapped(gateway)
    gateway.answer(trap)
    harness.done()


def test_video_memory_is_no_ram() -> None:
    regions = [RamRegion(0, 2 << 30, 0), RamRegion(4 << 30, 1 << 30, 2 << 30)]
    assert ram_ranges(regions) == [
        RamRange(0, 0xA0000),
        RamRange(1 << 20, (2 << 30) - (1 << 20)),
        RamRange(4 << 30, 1 << 30),
    ]
    assert ram_ranges([RamRegion(0xB0000, 0x1000, 0)]) == []
