"""The engine as devices use it: :class:`~vmbus.ports.DataPath` of one machine.

    device: FastChannel ── give, recall ──→ EngineChannel ──→ Engine (thread.py) ──→ engine.c
                        ←─ answered, returned, left, ended ──┘

It knows what a device does not: the gateway's doorbells, the words of the vCPUs, how QEMU is asked for an interrupt.
"""

from __future__ import annotations

import ctypes
import logging
import mmap
import os
from collections.abc import Callable, Sequence

from vmbus.errors import GatewayError
from vmbus.machine.engine.build import LIBRARY
from vmbus.machine.engine.layout import (
    MAX_CHANNELS,
    MAX_REGIONS,
    QUEUE_RAM,
    ChannelCounts,
    EngineSetup,
    Mirror,
    MirrorHeader,
    Region,
)
from vmbus.machine.engine.queue import EngineQueue
from vmbus.machine.engine.thread import Engine, Functions, Target
from vmbus.machine.gateway.client import Gateway
from vmbus.machine.io.addresses import address_of
from vmbus.machine.memory import MappedMemory
from vmbus.machine.qemu.qtest import LocalApics, Qtest
from vmbus.ports import (
    PAGE_SIZE,
    DataPathOwner,
    EventLoop,
    FastLink,
    GivenChannel,
    RecalledChannel,
    SharedFile,
)

_logger = logging.getLogger(__name__)


class EngineDataPath:
    """The engine of one machine. Made by :meth:`start`."""

    def __init__(
        self,
        engine: Engine,
        mirror: mmap.mmap,
        wake_fd: int,
        loop: EventLoop,
        memory: MappedMemory,
        gateway: Gateway,
        qtest: Qtest,
        interrupts: LocalApics,
        ended: Callable[[], None],
    ) -> None:
        self.engine = engine
        self._own_mirror = mirror
        self._mirror: memoryview | None = None
        """The one that a successor finds, if there is any."""
        self._epoch = 0
        """Of that one."""
        self._wake_fd = wake_fd
        self._loop = loop
        self._memory = memory
        self._gateway = gateway
        self._qtest = qtest
        self._ended = ended
        self.interrupts = interrupts
        self._words = gateway.pending.addresses()
        self._unused = ctypes.c_uint32()
        """Where the engine says that it sleeps while the gateway is another process's."""
        self._free = list(range(MAX_CHANNELS))[::-1]
        engine.noted = self._noted
        engine.stored = self._stored
        engine.lines_due = self._read_answers
        qtest.other = engine
        loop.add_reader(engine.fileno(), self.dispatch)

    @classmethod
    def start(
        cls,
        loop: EventLoop,
        memory: MappedMemory,
        gateway: Gateway,
        qtest: Qtest,
        interrupts: LocalApics,
        ended: Callable[[], None],
        *,
        busy_waits: bool,
    ) -> EngineDataPath | None:
        """Start the engine; ``None`` where there can be none, with the reason in the log.

        ``ended`` is called when requests have ended. ``busy_waits``: the host has a processor to spare.
        """
        native = memory.native()
        if len(native.regions) > MAX_REGIONS:
            return None
        try:
            wake_fd = gateway.engine_event()
        except GatewayError as error:
            _logger.warning("no engine, so disks are slower: %s", error)
            return None
        mirror = mmap.mmap(-1, ctypes.sizeof(Mirror))
        setup = EngineSetup(
            ram=native.address,
            ram_size=native.size,
            dirty=native.dirty,
            notes=native.notes or None,
            note_pages=native.note_pages,
            mirror=address_of(mirror),
            waiting=gateway.engine_waiting_address(),
            wake_fd=wake_fd,
            qtest_fd=qtest.fileno(),
            region_count=len(native.regions),
        )
        for index, (gpa, size, offset) in enumerate(native.regions):
            setup.region[index] = Region(offset, size, gpa)
        try:
            engine = Engine.start(str(LIBRARY.build()), setup, busy_waits=busy_waits)
        except OSError as error:
            _logger.info("no engine, so disks are slower: %s", error)
            os.close(wake_fd)
            return None
        return cls(engine, mirror, wake_fd, loop, memory, gateway, qtest, interrupts, ended)

    def open_channel(self, owner: DataPathOwner, functions: tuple[int, int, int]) -> EngineChannel | None:
        """See :class:`~vmbus.ports.DataPath`."""
        if not self._free:
            return None
        return EngineChannel(self, self._free.pop(), owner, Functions(*functions))

    def free(self, number: int) -> None:
        """Take back the number of a channel that is closed, and of which nothing is outstanding."""
        self._free.append(number)

    def dispatch(self) -> None:
        """Pass on what the engine has reported."""
        self.engine.dispatch()
        self._ended()

    def make_queue(self) -> EngineQueue | None:
        """See :class:`~vmbus.ports.DataPath`."""
        native = self._memory.native()
        if native.fd < 0:
            return None
        return EngineQueue(self.engine, SharedFile(native.fd, native.size, QUEUE_RAM))

    def target(self, channel: GivenChannel) -> Target:
        """Return where the engine signals the guest."""
        target = channel.target
        return Target(
            flag_offset=target.address - self._memory.address,
            flag_bit=target.bit,
            vector=target.vector,
            line=self._qtest.line(self.interrupts.apic_ids[target.vp], target.vector),
            words=self._words[target.vp],
        )

    def offsets(self, pages: Sequence[int]) -> list[int]:
        """Return the offsets in the file of guest RAM of pages at addresses in this process."""
        return [page - self._memory.address for page in pages]

    def doorbell(self, relid: int) -> int:
        """Return the address of the doorbell of a channel."""
        return self._gateway.doorbell_address(relid)

    def use_gateway(self) -> None:
        """Be woken by the gateway, which this process has just taken (``Gateway.take``)."""
        event = self._gateway.engine_event()
        try:
            self.engine.use_doorbells(event, self._gateway.engine_waiting_address())
        finally:
            os.close(event)

    def use_mirror(self, memory: memoryview) -> None:
        """See :class:`~vmbus.machine.io.engines.MachineDataPath`."""
        self.engine.begin_mirror(address_of(memory))
        self._mirror = memory
        self._epoch = MirrorHeader.from_buffer_copy(memory).epoch

    def link(self, number: int) -> FastLink | None:
        """Return what a journal has to say of a channel; ``None`` without a journal."""
        if self._mirror is None:
            return None
        return FastLink(self._epoch, number, *self.engine.link(number))

    def leave_gateway(self) -> None:
        """See :class:`~vmbus.machine.io.engines.MachineDataPath`.

        The next process asks the gateway for an eventfd of its own, so that the word and the mirror are all that both
        would have.
        """
        self.engine.use_waiting(ctypes.addressof(self._unused))
        self.engine.switch_mirror(address_of(self._own_mirror))

    def return_to_gateway(self) -> None:
        """See :class:`~vmbus.machine.io.engines.MachineDataPath`."""
        self.engine.use_waiting(self._gateway.engine_waiting_address())
        self.engine.switch_mirror(address_of(self._mirror or self._own_mirror))

    def report_ranges(self, on: bool) -> None:
        """See :class:`~vmbus.machine.io.engines.MachineDataPath`."""
        self.engine.report_ranges(on)

    def _pieces(self, ranges: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
        found = []
        for offset, length in ranges:
            gpa = self._memory.gpa_of_page(offset // PAGE_SIZE)
            if gpa is not None:
                found.append((gpa + offset % PAGE_SIZE, length))
        return found

    def _read_answers(self) -> None:
        self._qtest.read_answers()
        self.engine.allow_lines(self._qtest.unanswered)

    def _noted(self, ranges: Sequence[tuple[int, int]]) -> None:
        for gpa, length in self._pieces(ranges):
            self._memory.write_through(gpa, length)

    def _stored(self, ranges: Sequence[tuple[int, int]]) -> None:
        self._memory.filled_by_kernel(self._pieces(ranges))

    def close(self) -> None:
        """End the thread. No channel is given."""
        self._loop.remove_reader(self.engine.fileno())
        self._qtest.end_other()
        if left := self.engine.close():
            _logger.warning("the engine ends with %d transfers under way", left)
        os.close(self._wake_fd)


class EngineChannel:
    """:class:`~vmbus.ports.DataPathChannel`, and the owner of the channel for the engine."""

    def __init__(self, path: EngineDataPath, number: int, owner: DataPathOwner, functions: Functions) -> None:
        self._path = path
        self._number = number
        self._owner = owner
        self._functions = functions
        self._given: GivenChannel | None = None
        self._closed = False
        self._outstanding = 0
        self._counted = ChannelCounts()

    @property
    def outstanding(self) -> int:
        if self._given is not None:
            return self._path.engine.outstanding(self._number)
        return self._outstanding

    def give(self, channel: GivenChannel) -> bool:
        path = self._path
        given = path.engine.give(
            self._number,
            self,
            self._functions,
            path.target(channel),
            incoming=(path.offsets(channel.incoming.pages), channel.incoming.index),
            outgoing=(path.offsets(channel.outgoing.pages), channel.outgoing.index),
            doorbell=path.doorbell(channel.relid),
        )
        if given:
            self._given = channel
        return given

    def recall(self) -> RecalledChannel:
        path, given = self._path, self._given
        found = path.engine.recall(self._number)
        self._given = None
        self._outstanding = found.outstanding
        before, self._counted = self._counted, found.counts
        if found.interrupt_owed and given is not None:
            # The event flag is set already, so a signal of the channel would not interrupt.
            path.interrupts.request(given.target.vp, given.target.vector)
        done = {
            name: getattr(found.counts, name) - getattr(before, name) for name, *_ in ChannelCounts._fields_
        }
        return RecalledChannel(
            read_index=found.read_index,
            write_index=found.write_index,
            was_left=bool(found.was_left),
            **done,
        )

    def look(self) -> None:
        self._path.dispatch()

    @property
    def link(self) -> FastLink | None:
        return self._path.link(self._number)

    def recorded(self) -> None:
        self._path.engine.recorded(self._number)

    def close(self) -> None:
        self._closed = True
        self._path.dispatch()
        self._path.engine.forget(self._number)
        self._free_if_ended()

    def _free_if_ended(self) -> None:
        if self._closed and self._outstanding == 0:
            self._closed = False
            self._path.free(self._number)

    # --- called by the engine ---

    def engine_left(self) -> None:
        self._owner.engine_left()

    def engine_answered(self, answer: bytes) -> None:
        self._outstanding -= 1
        self._owner.engine_answered(answer)

    def engine_returned(self, packet: bytes) -> None:
        self._outstanding -= 1
        self._owner.engine_returned(packet)

    def engine_ended(self) -> None:
        self._outstanding -= 1
        try:
            self._owner.engine_ended()
        finally:
            self._free_if_ended()

    def engine_failed(self, error: Exception) -> None:
        self._owner.engine_failed(error)
