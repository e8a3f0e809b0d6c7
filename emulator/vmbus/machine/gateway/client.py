"""The emulator's end of the trap gateway (docs/gateway.md).

The gateway, a plug-in inside QEMU, shares one region of memory with the emulator: traps of the guest appear in
slots there, answers are stored beside them, doorbells are bytes. The socket serves to attach and to activate; its end
means that the other side has ended::

    gateway = Gateway.attach(path)
    gateway.set_cpuid(leaves)
    gateway.set_doorbells(rules)
    gateway.activate()                      # from now on there are traps
    loop.add_reader(gateway.fileno(), ready)

    def ready():
        gateway.awake()
        while True:
            traps = gateway.traps()
            for post in gateway.posts.take():   # they came before the traps of the same vCPU
                ...
            for trap in traps:
                gateway.answer(trap, value)
            for index in gateway.doorbells():
                ...
            if not gateway.sleep_prepare():
                break

A trap may be answered at any later time; its vCPU waits, in a way that lets QEMU stop, reset or interrupt it. All
calls are made from one thread, and need a host with the store order of x86.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import socket
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from vmbus.errors import GatewayError, InternalError
from vmbus.machine.gateway.conversation import TIMEOUT, check_reply, close_all, converse
from vmbus.machine.gateway.journal import map_journal
from vmbus.machine.gateway.pending import PendingInterrupts
from vmbus.machine.gateway.posts import PostRing
from vmbus.machine.gateway.shared import CodePages, GatewayClock, reclaim_doorbells
from vmbus.machine.gateway.tables import Tables
from vmbus.machine.gateway.traps import Fault, GivenAnswer, Trap, Unclaimed
from vmbus.wire import gateway as wire
from vmbus.wire.cpuid import CpuidLeaf
from vmbus.wire.gateway import (
    ConstantMsr,
    DoorbellRule,
    GuestState,
    PostRule,
    RamRange,
    TrapKind,
    Verdict,
    offset_of,
)

_SYS_FUTEX = 202
_FUTEX_WAKE = 1
_KINDS = {int(kind): kind for kind in TrapKind}

_CONTROL = {
    name: offset_of(wire.CONTROL, name) // 4
    for name in (
        "vcpus",
        "emulator",
        "owner",
        "resets",
        "waiting",
        "engine_waiting",
        "guest",
        "hold_timeout_ms",
        "spin_ns",
        "poll_ns",
    )
}
_MASK64 = (1 << 64) - 1

MAX_VCPUS = 4096
"""vCPUs of one QEMU, more than any machine type has."""


class Gateway:
    """An attachment to the gateway of one QEMU. Made by :meth:`attach`; one thread uses it."""

    def __init__(
        self, connection: socket.socket, region: mmap.mmap, memory: int, event: int, header: Any
    ) -> None:
        self._connection = connection
        self._region = region
        self._memory = memory
        self._event = event
        self._fence = threading.Lock()
        self._view = memoryview(region)
        self._quads = self._view.cast("Q")
        self._words = self._view.cast("I")
        self._vcpus_max = header.vcpus_max
        self._owner = header.owner
        self._journal_size = header.journal_size
        self._vcpu_offset = header.vcpu_offset
        self._doorbell_offset = header.doorbell_offset
        self._doorbell_limit = wire.DOORBELLS
        self.code_pages = CodePages(region, header.code_offset, header.code_pages)
        """Guest pages that code was translated from."""
        self.clock = GatewayClock(region, self._words)
        """The guest's TSC."""
        slots = self._vcpus_max * wire.SLOTS
        first = header.request_offset // 8
        self._requests = self._quads[first : first + slots]
        self._snapshot = b""
        self._seen = [0] * slots
        vcpus = [header.vcpu_offset + vcpu * wire.VCPU_SIZE for vcpu in range(self._vcpus_max)]
        at = {
            name: offset_of(wire.VCPU, name)
            for name in ("sleeping", "retired", "answers", "slots", "auto_eoi", "auto_eoi_failures")
        }
        self._sleeping_at = [(base + at["sleeping"]) // 4 for base in vcpus]
        self.pending = PendingInterrupts(region, self._quads, vcpus)
        """Interrupts that vCPUs raise by themselves."""
        self.posts = PostRing(region, self._quads, header.post_offset, header.vcpus_max, header.owner)
        """Traps that have their answer."""
        self._tables = Tables(region, self._words, self._fence)
        self._auto_eoi_at = [(base + at["auto_eoi"]) // 8 for base in vcpus]
        self._auto_eoi_failures_at = [(base + at["auto_eoi_failures"]) // 8 for base in vcpus]
        every = [(base, slot) for base in vcpus for slot in range(wire.SLOTS)]
        self._retired_at = [(base + at["retired"]) // 8 + slot for base, slot in every]
        self._answer_at = [(base + at["answers"] + slot * wire.ANSWER_SIZE) // 8 for base, slot in every]
        self._slot_at = [base + at["slots"] + slot * wire.SLOT_SIZE for base, slot in every]
        self._carried: dict[tuple[int, ...], Unclaimed] = {}
        self._origin = ctypes.c_char.from_buffer(region)
        self._address = ctypes.addressof(self._origin)
        self._syscall = ctypes.PyDLL(None).syscall
        self._scratch = ctypes.c_uint32()
        self._took = False

    # --- attaching ---

    @classmethod
    def attach(cls, path: Path | str, *, takeover: bool = False) -> Gateway:
        """Attach to the gateway that listens on ``path``; ``takeover`` detaches an emulator that is attached.

        Requests that another emulator left unanswered are returned again by :meth:`traps`. Raises
        :class:`~vmbus.errors.GatewayError` with a message that says what to do.
        """
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            connection.settimeout(TIMEOUT)
            connection.connect(str(path))
        except OSError as error:
            connection.close()
            raise GatewayError(
                f"no trap gateway listens on {path} ({error.strerror}): QEMU must run with "
                f"-plugin vmbus-gateway.so,socket={path}, as the same user"
            ) from error
        return cls.attach_over(connection, path, takeover=takeover)

    @classmethod
    def attach_over(cls, connection: socket.socket, path: Path | str, *, takeover: bool = False) -> Gateway:
        """Attach as :meth:`attach` over ``connection``, which is closed on failure; ``path`` is for messages."""
        descriptors: list[int] = []
        try:
            flags = wire.HELLO_TAKEOVER if takeover else 0
            reply, descriptors = converse(connection, wire.Message(wire.MessageType.HELLO, flags=flags))
            check_reply(path, reply)
            if len(descriptors) != 2:
                raise GatewayError(
                    f"{path} sent {len(descriptors)} descriptors, expected 2: "
                    "restart QEMU with this emulator's own gateway"
                )
            gateway = cls._over(connection, path, reply.argument, *descriptors)
        except BaseException:
            connection.close()
            for descriptor in descriptors:
                os.close(descriptor)
            raise
        gateway.take()
        return gateway

    @classmethod
    def adopt(cls, descriptors: Sequence[int], size: int, path: Path | str) -> Gateway:
        """Continue an attachment of another process with what its :meth:`descriptors` and :attr:`size` were.

        Until :meth:`take`, that process may use it. The gateway does not notice the change. Requests that are not
        answered are returned by :meth:`traps`. The descriptors belong to the result, or are closed. Raises
        :class:`~vmbus.errors.GatewayError`.
        """
        number, memory, event = descriptors
        connection = socket.socket(fileno=number)
        connection.setblocking(False)
        try:
            return cls._over(connection, path, size, memory, event)
        except BaseException:
            connection.close()
            close_all([memory, event])
            raise

    @classmethod
    def _over(
        cls, connection: socket.socket, path: Path | str, size: int, memory: int, event: int
    ) -> Gateway:
        region = _map(path, memory, size)
        header = wire.CONTROL_HEADER.parse(region[: wire.CONTROL_HEADER_SIZE])  # QEMU may change it later
        if header.magic != wire.MAGIC or header.version != wire.VERSION:
            region.close()
            raise GatewayError(
                f"{path}: shared memory of version {header.version}, expected {wire.VERSION}: "
                "restart QEMU with this emulator's own gateway"
            )
        if wrong := _misplaced(header, len(region)):
            region.close()
            raise GatewayError(f"{path}: the shared memory is damaged ({wrong}): restart QEMU")
        return cls(connection, region, memory, event, header)

    def take(self) -> None:
        """Begin to use the shared memory: no other process does, not even the one that it was adopted from."""
        self._took = True
        self._words[_CONTROL["waiting"]] = 0
        reclaim_doorbells(self._region, self._doorbell_offset)
        self.posts.begin()

    def descriptors(self) -> tuple[int, int, int]:
        """Return the connection, the shared memory and the eventfd, for :meth:`adopt` in another process."""
        return self._connection.fileno(), self._memory, self._event

    @property
    def size(self) -> int:
        """Bytes of the shared memory."""
        return len(self._region)

    def activate(self) -> None:
        """Make requests of the guest's traps, from now on. The tables are in place.

        In the first 20 ms of QEMU's life, wait until the TSC's frequency can be measured. Raises
        :class:`~vmbus.errors.GatewayError` if that does not happen.
        """
        self.clock.arm()
        deadline = time.monotonic() + TIMEOUT
        known, *_, frequency = self.clock.fields()
        while known and not frequency:
            if time.monotonic() > deadline:
                raise GatewayError(
                    f"the trap gateway did not measure the frequency of the TSC in {TIMEOUT:g} s: restart QEMU"
                )
            time.sleep(0.01)
            self.refresh_clock()
            *_, frequency = self.clock.fields()
        self._request(wire.MessageType.ACTIVATE)

    def engine_event(self) -> int:
        """Return a new eventfd, which the gateway writes for doorbells of the engine. The caller closes it.

        Before :meth:`take` the gateway does not know it, nor :meth:`engine_waiting_address`: ask again afterwards.
        """
        if not self._took:
            return os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        reply, descriptors = converse(self._connection, wire.Message(wire.MessageType.ENGINE))
        if reply.status != wire.Status.OK or len(descriptors) != 1:
            close_all(descriptors)
            raise GatewayError(f"the trap gateway has no eventfd for the engine (status {reply.status})")
        return descriptors[0]

    def journal_memory(self) -> mmap.mmap:
        """Map the memory that QEMU keeps for the emulators that serve this guest, one after the other.

        It has :data:`~vmbus.wire.gateway.JOURNAL_SIZE` bytes, all 0 at first. Every call, of any process, maps the
        same ones; the caller closes the mapping. What is in it may be of any emulator, and QEMU can change it. Raises
        :class:`~vmbus.errors.GatewayError`, and :class:`~vmbus.errors.InternalError` before :meth:`take`: until then
        the connection belongs to another process.
        """
        if not self._took:
            raise InternalError("the journal is of the process that serves the guest: call take() first")
        if not self._journal_size:
            raise GatewayError(
                "the trap gateway has no journal: restart QEMU with this emulator's own gateway"
            )
        reply, descriptors = converse(self._connection, wire.Message(wire.MessageType.JOURNAL))
        try:
            return map_journal(reply, descriptors)
        finally:
            close_all(descriptors)

    @property
    def resets(self) -> int:
        """How often the reset vector was executed since QEMU started, modulo 2^32: once, and at each reset.

        See docs/gateway.md#resets for what else counts. Stays 0 in a QEMU whose gateway has no journal.
        """
        return int(self._words[_CONTROL["resets"]])

    def engine_waiting_address(self) -> int:
        """Return the address of the word that says that the engine sleeps on that eventfd."""
        if not self._took:
            return ctypes.addressof(self._scratch)
        return int(self._address) + 4 * _CONTROL["engine_waiting"]

    def doorbell_address(self, number: int) -> int:
        """Return the address of a doorbell, whose bits other threads change, too."""
        if not 0 <= number < wire.DOORBELLS:
            raise InternalError(f"there is no doorbell {number}")
        return int(self._address + self._doorbell_offset + number)

    def refresh_clock(self) -> None:
        """Have the gateway compare the host's TSC and its monotonic clock now, instead of at the next trap."""
        self._request(wire.MessageType.CLOCK)

    def _request(self, kind: wire.MessageType) -> None:
        reply, descriptors = converse(self._connection, wire.Message(kind))
        close_all(descriptors)  # of which it has to send none
        if reply.status != wire.Status.OK:
            raise GatewayError(f"the trap gateway refused {kind.name} with status {reply.status}")

    @property
    def closed(self) -> bool:
        """Whether QEMU has ended, another emulator took over, or :meth:`close` was called."""
        if self._connection.fileno() < 0:
            return True
        try:
            return not self._connection.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except BlockingIOError:
            return False
        except OSError:
            return True

    def fileno(self) -> int:
        """Return an eventfd, readable when there is work; for ``add_reader``."""
        return self._event

    def connection_fileno(self) -> int:
        """Return the socket's descriptor, which is readable once :attr:`closed`."""
        return self._connection.fileno()

    def close(self) -> None:
        """Detach. The guest's traps, and its doorbells, wait for the next emulator."""
        if self._connection.fileno() < 0:
            return
        self._connection.close()
        os.close(self._event)
        os.close(self._memory)
        for view in (self._requests, self._quads, self._words, self._view):
            view.release()
        del self._origin
        self._region.close()

    # --- what the gateway answers by itself ---

    def set_cpuid(self, leaves: Iterable[CpuidLeaf]) -> None:
        """Set leaves 0x40000000..0x400000FF of CPUID; a leaf that is not given is all zeros."""
        entries = b"".join(
            wire.CPUID_ENTRY.build(
                {"leaf": leaf.leaf, "eax": leaf.eax, "ebx": leaf.ebx, "ecx": leaf.ecx, "edx": leaf.edx}
            )
            for leaf in leaves
        )
        self._tables.write("cpuid", entries)

    def set_doorbells(self, rules: Sequence[DoorbellRule]) -> None:
        """Set the VMCALLs that complete without an answer; the first rule that matches applies."""
        if any(rule.first + rule.count > wire.DOORBELLS for rule in rules):
            raise InternalError(f"doorbell numbers end at {wire.DOORBELLS}")
        entries = b"".join(wire.DOORBELL_RULE.build(rule) for rule in rules)
        self._tables.write("rules", entries)
        self._doorbell_limit = max((rule.first + rule.count for rule in rules), default=0)

    def set_constant_msrs(self, msrs: Iterable[ConstantMsr]) -> None:
        """Set the MSRs that the gateway reads by itself."""
        entries = b"".join(wire.MSR_ENTRY.build(each) for each in msrs)
        self._tables.write("msrs", entries)

    def set_posts(self, rule: PostRule, ram: Sequence[RamRange]) -> None:
        """Set what the gateway may post once it has a promise, and where guest RAM is: it reads messages there."""
        self._tables.write("ram", b"".join(wire.RAM_RANGE.build(each) for each in ram[: wire.RAM_RANGES]))
        self._tables.write("posts", wire.POST_RULE.build(rule))

    def set_hold_timeout(self, seconds: float, statuses: Mapping[int, int]) -> None:
        """Set how long the guest waits for a next emulator, and the results after that time.

        ``statuses``: result of a VMCALL by its call code. Other traps, and all if ``seconds`` is 0, wait for ever.
        """
        entries = b"".join(
            wire.GONE_ENTRY.build({"code": code, "status": status}) for code, status in statuses.items()
        )
        self._tables.write("gone", entries)
        self._words[_CONTROL["hold_timeout_ms"]] = min(round(seconds * 1000), 0xFFFFFFFF)

    def set_spin(self, nanoseconds: int) -> None:
        """Set how long a vCPU polls for its answer before it sleeps (less than a millisecond)."""
        self._words[_CONTROL["spin_ns"]] = nanoseconds

    def set_poll(self, nanoseconds: int) -> None:
        """Set how long a vCPU polls for an interrupt before it halts, at most; 0: vCPUs do not poll."""
        self._words[_CONTROL["poll_ns"]] = nanoseconds

    @property
    def guest(self) -> GuestState:
        """Where the guest is, as emulators have set it; kept as long as QEMU runs."""
        return GuestState(self._words[_CONTROL["guest"]])

    @guest.setter
    def guest(self, state: GuestState) -> None:
        self._words[_CONTROL["guest"]] = state

    def set_auto_eoi(self, vcpu: int, vectors: Iterable[int]) -> None:
        """Set the interrupt vectors of ``vcpu`` that the gateway ends as soon as they are delivered."""
        bitmap = [0, 0, 0, 0]
        for vector in vectors:
            bitmap[vector >> 6] |= 1 << (vector & 63)
        for index, part in enumerate(bitmap):
            self._quads[self._auto_eoi_at[vcpu] + index] = part

    def auto_eoi_failures(self, vcpu: int) -> int:
        """Return how many interrupts of ``vcpu`` the gateway could not look at: its local APIC does not respond."""
        return int(self._quads[self._auto_eoi_failures_at[vcpu]])

    def _full_fence(self) -> None:
        """Order stores before loads: to take an uncontended lock is a locked instruction."""
        self._fence.acquire()
        self._fence.release()

    # --- traps ---

    def traps(self) -> list[Trap]:
        """Return the requests that appeared since the last call, each once.

        Raises :class:`~vmbus.errors.GatewayError` when another emulator has taken over, and for a trap of unknown
        kind.
        """
        if self._words[_CONTROL["owner"]] != self._owner:
            raise GatewayError("another emulator has taken over the trap gateway")
        snapshot = self._requests.tobytes()
        if snapshot == self._snapshot:
            return []
        self._snapshot = snapshot
        found: list[Trap] = []
        quads, seen = self._quads, self._seen
        for index, sequence in enumerate(self._requests.tolist()):
            if sequence == seen[index]:
                continue
            seen[index] = sequence
            if quads[self._answer_at[index]] == sequence or quads[self._retired_at[index]] == sequence:
                continue
            kind, flags, *registers = wire.SLOT_STRUCT.unpack_from(self._region, self._slot_at[index])
            known = _KINDS.get(kind)
            if known is None:
                raise GatewayError(f"the trap gateway passed a trap of unknown kind {kind}")
            trap = Trap._make(
                (
                    index // wire.SLOTS,
                    index % wire.SLOTS,
                    sequence,
                    known,
                    bool(flags & wire.SLOT_LONG_MODE),
                    *registers,
                )
            )
            if self._carried and (carried := self._carried.pop(trap.identity, None)) is not None:
                self._answer(trap, carried.value, carried.verdict)
            else:
                found.append(trap)
        return found

    @staticmethod
    def given(trap: Trap, value: int, fault: Fault | None) -> GivenAnswer:
        """Return the answer to ``trap`` as :meth:`repeat_answer` takes it."""
        index = trap.vcpu * wire.SLOTS + trap.slot
        verdict = Verdict.OK if fault is None else Verdict.FAULT
        return GivenAnswer(index, trap.sequence, int(verdict), value & _MASK64 if fault is None else 0)

    def answer(self, trap: Trap, value: int = 0) -> None:
        """Answer with a result: the value that RDMSR reads, the status of VMCALL; WRMSR has none."""
        self._answer(trap, value & _MASK64, Verdict.OK)

    def answer_fault(self, trap: Trap, fault: Fault) -> None:
        """Make the instruction fault: :attr:`Fault.GP` for MSRs, :attr:`Fault.UD` for VMCALL."""
        if (fault is Fault.UD) != (trap.kind is TrapKind.VMCALL):
            raise InternalError(f"{trap.kind.name} cannot raise {fault.name}")
        self._answer(trap, 0, Verdict.FAULT)

    def _answer(self, trap: Trap, value: int, verdict: int) -> None:
        index = trap.vcpu * wire.SLOTS + trap.slot
        at = self._answer_at[index]
        quads = self._quads
        if self._requests[index] != trap.sequence or quads[self._retired_at[index]] == trap.sequence:
            return  # withdrawn, or forgotten, meanwhile
        if self._words[_CONTROL["owner"]] != self._owner:
            return  # another emulator answers now
        if quads[at] == trap.sequence:
            if self._words[2 * at + 4] == Verdict.AGAIN:
                return  # forgotten, and the vCPU has not repeated it
            raise InternalError(f"{trap.kind.name} of vCPU {trap.vcpu} was answered twice")
        self._store_answer(trap.vcpu, at, trap.sequence, value, verdict)

    def _store_answer(self, vcpu: int, at: int, sequence: int, value: int, verdict: int) -> None:
        quads = self._quads
        quads[at + 1] = value
        self._words[2 * at + 4] = verdict
        quads[at] = sequence
        self._fence.acquire()
        self._fence.release()
        if self._words[self._sleeping_at[vcpu]]:
            self._syscall(_SYS_FUTEX, ctypes.c_void_p(self._address + 8 * at), _FUTEX_WAKE, 1, None, None, 0)

    def repeat_answer(self, answer: GivenAnswer) -> None:
        """Give an answer of the emulator of before, unless that has given it, or nobody waits for it any more."""
        if not 0 <= answer.place < len(self._requests):
            return
        sequence, at = answer.sequence, self._answer_at[answer.place]
        quads = self._quads
        if (
            self._requests[answer.place] == sequence
            and quads[self._retired_at[answer.place]] != sequence
            and quads[at] != sequence
        ):
            self._store_answer(answer.place // wire.SLOTS, at, sequence, answer.value, answer.verdict)

    def forget_requests(self) -> None:
        """Drop requests, posts, doorbells and pending interrupts after a reset, and sample the TSC anew."""
        quads = self._quads
        for index, sequence in enumerate(self._requests.tolist()):
            if sequence and quads[self._retired_at[index]] != sequence:
                self._seen[index] = sequence
                self._store_answer(
                    index // wire.SLOTS, self._answer_at[index], sequence, 0, int(Verdict.AGAIN)
                )
        self._carried.clear()
        self.pending.forget()
        self.posts.take()
        self.doorbells()
        self.clock.arm()

    def unclaimed(self) -> list[Unclaimed]:
        """Return the answers that no vCPU has fetched. Call it while the machine is stopped."""
        quads = self._quads
        found = []
        for index, sequence in enumerate(self._requests.tolist()):
            at = self._answer_at[index]
            if sequence and quads[at] == sequence and quads[self._retired_at[index]] != sequence:
                verdict = self._words[2 * at + 4]
                if verdict != Verdict.AGAIN:
                    kind, _, _, *registers = wire.SLOT_STRUCT.unpack_from(self._region, self._slot_at[index])
                    found.append(Unclaimed((index // wire.SLOTS, kind, *registers), verdict, quads[at + 1]))
        return found + self.carried()

    def carried(self) -> list[Unclaimed]:
        """Return the answers from before a migration that no trap has repeated; they are not in shared memory."""
        return list(self._carried.values())

    @property
    def carries(self) -> bool:
        """Whether answers from before a migration wait: their traps must come here, and must not be posted."""
        return bool(self._carried)

    def carry(self, unclaimed: Iterable[Unclaimed]) -> None:
        """Take over answers from before a migration: a trap that repeats one of theirs gets that answer."""
        self._carried = {entry.identity: entry for entry in unclaimed}

    # --- doorbells ---

    def doorbells(self) -> list[int]:
        """Return the doorbells rung since the last call, in ascending order.

        They are cleared before the return: what the guest stored before it rang is visible, and the next call returns
        a doorbell that is rung again.
        """
        start = self._doorbell_offset
        bells = self._region[start : start + self._doorbell_limit]
        at = bells.find(1)
        if at < 0:
            return []
        found = []
        while at >= 0:
            found.append(at)
            self._region[start + at] = 0
            at = bells.find(1, at + 1)
        self._full_fence()
        return found

    # --- sleeping ---

    def sleep_prepare(self) -> bool:
        """Request a wake-up through :meth:`fileno`; return True if there is work already: do not sleep."""
        self._words[_CONTROL["waiting"]] = 1
        self._fence.acquire()
        self._fence.release()
        start = self._doorbell_offset
        if (
            self._requests.tobytes() != self._snapshot
            or self._region[start : start + self._doorbell_limit].find(1) >= 0
            or self._quads[self.posts.head_at] != self.posts.tail
        ):
            self._words[_CONTROL["waiting"]] = 0
            return True
        return False

    def awake(self) -> None:
        """Request no wake-up any more."""
        self._words[_CONTROL["waiting"]] = 0
        with suppress(BlockingIOError):
            os.eventfd_read(self._event)

    # --- counters ---

    @property
    def vcpus(self) -> int:
        """Number of vCPUs that have run so far."""
        return min(int(self._words[_CONTROL["vcpus"]]), int(self._vcpus_max))

    def counters(self) -> list[dict[str, int]]:
        """Return the gateway's counters, one mapping for each vCPU."""
        first = offset_of(wire.VCPU, wire.COUNTERS[0])
        found = []
        for vcpu in range(self.vcpus):
            at = (self._vcpu_offset + vcpu * wire.VCPU_SIZE + first) // 8
            found.append(
                dict(zip(wire.COUNTERS, self._quads[at : at + len(wire.COUNTERS)].tolist(), strict=True))
            )
        return found


def _map(path: Path | str, memory: int, size: int) -> mmap.mmap:
    """Map the region of ``size`` bytes that a gateway announces. Raises :class:`~vmbus.errors.GatewayError`."""
    there = os.fstat(memory).st_size
    if not wire.CONTROL_SIZE <= size <= there or size % 8:
        raise GatewayError(f"{path} announces {size} bytes of shared memory and sent {there}: restart QEMU")
    try:
        return mmap.mmap(memory, size, mmap.MAP_SHARED)
    except (OSError, ValueError) as error:
        raise GatewayError(f"{path}: its shared memory of {size} bytes cannot be mapped: {error}") from error


def _misplaced(header: Any, size: int) -> str:
    """Return which part of a region of ``size`` bytes does not lie in it, or nothing.

    QEMU runs the guest: what it says about memory of this process is not believed. Compiled code uses these places.
    """
    if not 1 <= header.vcpus_max <= MAX_VCPUS or header.vcpus > header.vcpus_max:
        return f"{header.vcpus} of {header.vcpus_max} vCPUs"
    parts = (
        ("vCPUs", header.vcpu_offset, header.vcpus_max * wire.VCPU_SIZE, 8),
        ("requests", header.request_offset, header.vcpus_max * wire.SLOTS * 8, 8),
        ("doorbells", header.doorbell_offset, wire.DOORBELLS, 1),
        ("posts", header.post_offset, wire.POST_RING_SIZE, 8),
        ("code pages", header.code_offset, header.code_pages, 1),
    )
    for name, offset, length, alignment in parts:
        if offset % alignment or not wire.CONTROL_SIZE <= offset <= offset + length <= size:
            return f"{name} at {offset:#x}, {length:#x} bytes of {size:#x}"
    return ""
