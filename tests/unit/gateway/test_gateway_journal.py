"""The memory that outlives emulators, and the count of resets."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import resource
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from vmbus.errors import GatewayError, InternalError
from vmbus.machine.gateway.client import Gateway
from vmbus.machine.gateway.conversation import close_all, converse
from vmbus.machine.gateway.journal import map_journal
from vmbus.wire import gateway as wire

from tests.unit.gateway.gateway_harness import MSR, RDMSR, Harness, traps

Launch = Callable[..., Harness]
SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


def asked(gateway: Gateway, kind: int = wire.MessageType.JOURNAL) -> tuple[wire.Reply, list[int]]:
    """What the gateway answers to a message of this kind."""
    return converse(gateway._connection, wire.Message(kind))


# --- the memory -------------------------------------------------------------------------------------------------


def test_all_attachments_get_the_same_memory_which_is_empty_at_first(harness: Harness) -> None:
    first = harness.active()
    memory = first.journal_memory()
    assert memory[:] == bytes(wire.JOURNAL_SIZE)
    memory[:5] = b"first"
    memory[-4:] = b"last"
    with first.journal_memory() as again:
        assert (again[:5], again[-4:]) == (b"first", b"last")
    first.close()
    second = harness.active()
    with second.journal_memory() as inherited:
        assert (inherited[:5], inherited[-4:]) == (b"first", b"last")
        inherited[:5] = b"later"
        assert memory[:5] == b"later", "a mapping outlives its attachment"
    third = harness.attach(takeover=True)
    with third.journal_memory() as inherited:
        assert inherited[:5] == b"later"
    memory.close()


def test_no_size_but_its_own_and_no_room_before_it_is_written(harness: Harness) -> None:
    reply, descriptors = asked(harness.active())
    (memory,) = descriptors
    try:
        assert (reply.status, reply.argument) == (wire.Status.OK, wire.JOURNAL_SIZE)
        assert "vmbus-journal" in str(Path(f"/proc/self/fd/{memory}").readlink())
        assert fcntl.fcntl(memory, fcntl.F_GET_SEALS) == SEALS
        for size in (0, wire.JOURNAL_SIZE - 4096, wire.JOURNAL_SIZE + 4096):
            with pytest.raises(PermissionError):
                os.ftruncate(memory, size)
        with pytest.raises(PermissionError):
            fcntl.fcntl(memory, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
        found = os.fstat(memory)
        assert (found.st_size, found.st_blocks) == (wire.JOURNAL_SIZE, 0)
    finally:
        close_all(descriptors)


def test_a_mapping_keeps_no_descriptor_but_its_own(harness: Harness) -> None:
    gateway = harness.active()
    gateway.journal_memory().close()
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(10):
        gateway.journal_memory().close()
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_another_process_asks_once_the_guest_is_its_own(harness: Harness) -> None:
    first = harness.active()
    with first.journal_memory() as memory:
        memory[:5] = b"first"
    second = Gateway.adopt([os.dup(each) for each in first.descriptors()], first.size, harness.socket)
    with pytest.raises(InternalError, match="take"):
        second.journal_memory()
    first.refresh_clock()  # nothing is on the way on their connection
    second.take()
    with second.journal_memory() as memory:
        assert memory[:5] == b"first"
    second.close()


def free_number(process: int) -> int:
    """The lowest number that is no descriptor of a process."""
    used = {int(each.name) for each in Path(f"/proc/{process}/fd").iterdir()}
    return next(number for number in range(len(used) + 1) if number not in used)


@pytest.mark.parametrize(
    ("limit", "why"),
    [(resource.RLIMIT_NOFILE, errno.EMFILE), (resource.RLIMIT_FSIZE, errno.EFBIG)],
    ids=["descriptors", "size"],
)
def test_without_room_it_is_refused_and_asked_for_again_later(harness: Harness, limit: int, why: int) -> None:
    gateway = harness.active()
    process = harness.process.pid
    gateway.refresh_clock()  # what was passed to this process is closed there, and leaves no number free below others
    with ExitStack() as silent:
        for _ in range(6):  # poll() takes no more entries than there may be descriptors
            silent.enter_context(socket.socket(socket.AF_UNIX)).connect(str(harness.socket))
        gateway.refresh_clock()  # they are accepted
        least = free_number(process) if limit == resource.RLIMIT_NOFILE else 1 << 20
        before = resource.prlimit(process, limit, (least, resource.getrlimit(limit)[1]))
        with pytest.raises(GatewayError, match=rf"{os.strerror(why)}.*attach again"):
            gateway.journal_memory()
        assert not gateway.closed
        resource.prlimit(process, limit, before)
        with gateway.journal_memory() as memory:
            assert len(memory) == wire.JOURNAL_SIZE
    harness.start(RDMSR, rcx=MSR)
    (trap,) = traps(gateway)
    gateway.answer(trap, 3)
    assert harness.done().rax == 3


def test_a_request_that_is_not_known_is_answered_and_costs_nothing(harness: Harness) -> None:
    gateway = harness.active()
    reply, descriptors = asked(gateway, 99)
    assert (reply.type, reply.status, descriptors) == (99, wire.Status.UNKNOWN, [])
    gateway.refresh_clock()
    assert not gateway.closed


def test_a_gateway_of_before_is_not_asked(harness: Harness) -> None:
    """It would hang up."""
    gateway = harness.active()
    older = [os.dup(each) for each in gateway.descriptors()]
    at = wire.offset_of(wire.CONTROL, "journal_size")
    gateway._region[at : at + 8] = bytes(8)
    adopted = Gateway.adopt(older, gateway.size, harness.socket)
    adopted.take()
    with pytest.raises(GatewayError, match="restart QEMU with this emulator's own gateway"):
        adopted.journal_memory()
    adopted.refresh_clock()
    adopted.close()


# --- what the emulator does not believe ---------------------------------------------------------------------------


def file_of(size: int, seals: int) -> int:
    memory = os.memfd_create("journal", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(memory, size)
    fcntl.fcntl(memory, fcntl.F_ADD_SEALS, seals)
    return memory


def reply_of(status: int = wire.Status.OK, argument: int = wire.JOURNAL_SIZE) -> wire.Reply:
    return wire.Reply(wire.MESSAGE_MAGIC, wire.MessageType.JOURNAL, status, wire.VERSION, argument)


@pytest.fixture
def descriptors() -> Iterator[list[int]]:
    found: list[int] = []
    yield found
    close_all(found)


def test_a_sealed_file_of_the_right_size_is_mapped(descriptors: list[int]) -> None:
    descriptors.append(file_of(wire.JOURNAL_SIZE, SEALS))
    with map_journal(reply_of(), descriptors) as memory:
        memory[-1] = 1
        assert os.pread(descriptors[0], 1, wire.JOURNAL_SIZE - 1) == b"\1"


@pytest.mark.parametrize("missing", [fcntl.F_SEAL_SHRINK, fcntl.F_SEAL_GROW, fcntl.F_SEAL_SEAL])
def test_a_file_whose_size_could_change_is_refused(descriptors: list[int], missing: int) -> None:
    descriptors.append(file_of(wire.JOURNAL_SIZE, SEALS & ~missing))
    with pytest.raises(GatewayError, match="could change its size"):
        map_journal(reply_of(), descriptors)


@pytest.mark.parametrize(
    ("size", "announced"),
    [
        (0, wire.JOURNAL_SIZE),
        (wire.JOURNAL_SIZE - mmap.PAGESIZE, wire.JOURNAL_SIZE),
        (wire.JOURNAL_SIZE, wire.JOURNAL_SIZE - 1),
        (wire.JOURNAL_SIZE, (1 << 64) - 1),
        (mmap.PAGESIZE, mmap.PAGESIZE),
    ],
)
def test_another_size_is_refused(descriptors: list[int], size: int, announced: int) -> None:
    descriptors.append(file_of(size, SEALS))
    with pytest.raises(GatewayError, match=f"has {size} bytes, and {announced} were announced"):
        map_journal(reply_of(argument=announced), descriptors)


def test_what_is_no_memory_file_is_refused(descriptors: list[int], tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.touch()
    os.truncate(path, wire.JOURNAL_SIZE)
    here, there = socket.socketpair()
    for each in (os.open(path, os.O_RDWR), os.eventfd(0), here.detach(), there.detach()):
        descriptors.append(each)
        with pytest.raises(
            GatewayError, match=r"no memory file|could change its size"
        ):  # the latter: of a tmpfs
            map_journal(reply_of(), [each])


def test_a_file_that_cannot_be_written_is_refused(descriptors: list[int]) -> None:
    descriptors.append(file_of(wire.JOURNAL_SIZE, SEALS | fcntl.F_SEAL_WRITE))
    with pytest.raises(GatewayError, match="cannot be mapped"):
        map_journal(reply_of(), descriptors)


@pytest.mark.parametrize("count", [0, 2])
def test_any_other_number_of_descriptors_is_refused(descriptors: list[int], count: int) -> None:
    descriptors += [file_of(wire.JOURNAL_SIZE, SEALS) for _ in range(count)]
    with pytest.raises(GatewayError, match=f"{count} descriptors"):
        map_journal(reply_of(), descriptors)


@pytest.mark.parametrize(
    ("status", "argument", "said"),
    [
        (wire.Status.REFUSED, errno.ENOMEM, "Cannot allocate memory"),
        (wire.Status.REFUSED, (1 << 64) - 1, f"error {(1 << 64) - 1}"),
        (wire.Status.UNKNOWN, 0, "restart QEMU"),
        (77, 0, "status 77"),
    ],
)
def test_other_statuses_are_told_even_if_a_file_came_along(
    descriptors: list[int], status: int, argument: int, said: str
) -> None:
    descriptors.append(file_of(wire.JOURNAL_SIZE, SEALS))
    with pytest.raises(GatewayError, match=said):
        map_journal(reply_of(status, argument), descriptors)


# --- resets -----------------------------------------------------------------------------------------------------


def begin(
    harness: Harness, *, protected: int = 0, cs: int = 0xF000, ip: int = 0xFFF0, at: int = 0xFFFFFFF0
) -> bool:
    """Execute a block; whether the gateway counts it."""
    harness.send(f"begin 0 {protected} {cs:x} {ip:x} {at:x}")
    return harness.expect("begun") == ["0", "1"]


def test_executions_of_the_reset_vector_are_counted_with_or_without_an_emulator(harness: Harness) -> None:
    assert begin(harness)
    gateway = harness.active()
    assert gateway.resets == 1
    assert begin(harness)
    assert gateway.resets == 2
    assert not gateway.pending.failed(), "its neighbour counts interrupts that a vCPU could not raise"
    gateway.close()
    assert begin(harness)
    assert harness.active().resets == 3


@pytest.mark.parametrize(
    "place",
    [
        {"protected": 1, "cs": 8, "ip": 0xFFFFFFF0},  # flat code that runs into the firmware
        {"protected": 1},
        {"at": 0xFFFF0},  # JMP FAR F000:FFF0, as programs for DOS reboot
        {"ip": 0xFFEF, "at": 0xFFFFFFEF},
        {"cs": 0xFFFF, "ip": 0},
    ],
)
def test_other_code_is_not(harness: Harness, place: dict[str, int]) -> None:
    gateway = harness.active()
    assert not begin(harness, **place)
    assert gateway.resets == 0
