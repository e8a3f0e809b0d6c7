"""A model of a channel: rings of the guest, queues of the host, and a device.

``ModelRing`` is guest memory, which is transferred separately. ``ModelChannel`` is the host's end in one process.
``ModelDevice`` is its device, with a note (saved state) for every packet that it sent.
"""

from __future__ import annotations

import copy
import uuid
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from vmbus.errors import DeviceError, InternalError
from vmbus.saving import (
    ChannelSaver,
    ChannelState,
    NtStatus,
    OutgoingPacket,
    RestorePacket,
    SavableChannel,
    SavePacket,
    SavePacketResult,
)
from vmbus.wire.packet import GpaRange, TransferPages, TransferRange
from vmbus.wire.saved import (
    ChannelAxes,
    ChannelIdentity,
    SavedChannel,
    SavedCompletion,
    SavedGpadl,
    SavedOpen,
    SavedPacket,
)

INTERFACE = uuid.UUID("11111111-2222-3333-4444-555555555555")
OK = NtStatus.STATUS_SUCCESS
MORE = NtStatus.STATUS_MORE_PROCESSING_REQUIRED
TOO_SMALL = NtStatus.STATUS_BUFFER_TOO_SMALL
OVERFLOW = NtStatus.STATUS_BUFFER_OVERFLOW
BAD_STATE = NtStatus.STATUS_INVALID_DEVICE_STATE
BAD = NtStatus.STATUS_INVALID_PARAMETER


def identity(number: int = 1, subchannel: int = 0) -> ChannelIdentity:
    return ChannelIdentity(INTERFACE, uuid.UUID(int=number), subchannel)


def request(transaction_id: int, payload: bytes = b"request.", pfns: tuple[int, ...] = ()) -> SavedPacket:
    """Return a packet of the guest that requests a completion."""
    ranges = (GpaRange(len(pfns) * 4096, 0, pfns),) if pfns else ()
    return SavedPacket(9 if pfns else 6, 1, transaction_id, payload, ranges)


def transfer_request(transaction_id: int) -> SavedPacket:
    pages = TransferPages(0xCAFE, (TransferRange(1500, 0), TransferRange(60, 4096)))
    return SavedPacket(7, 1, transaction_id, b"frames..", (), pages)


@dataclass
class ModelRing:
    """Guest memory: packets that are written and not read, in both directions; ``room``: packets per direction."""

    room: int = 3
    to_host: deque[SavedPacket] = field(default_factory=deque)
    to_guest: deque[SavedPacket | SavedCompletion] = field(default_factory=deque)


class ModelDevice:
    """A device with a note for each packet that it sent; its callbacks succeed unless scripted."""

    def __init__(self) -> None:
        self.notes: dict[int, bytes] = {}
        self.state = b""
        self.given: list[SavedPacket] = []
        self.restored: list[int] = []
        self.completed: list[int] = []
        self.save_calls: list[int] = []
        self.save_script: list[SavePacketResult | Callable[[], SavePacketResult]] = []
        self.restore_script: list[NtStatus] = []
        self.refuses_save = False

    def save_packet(self, channel: ModelChannel, packet: SavedPacket, buffer: memoryview) -> SavePacketResult:
        self.save_calls.append(len(buffer))
        if self.save_script:
            answer = self.save_script.pop(0)
            return answer if isinstance(answer, SavePacketResult) else answer()
        note = self.notes.get(packet.transaction_id, b"")
        if len(buffer) < len(note):
            return SavePacketResult(TOO_SMALL, len(note))
        buffer[: len(note)] = note
        return SavePacketResult(OK, len(note))


class ModelChannel:
    """The host's end of one channel."""

    def __init__(
        self,
        who: ChannelIdentity | None = None,
        *,
        ring: ModelRing | None = None,
        device: ModelDevice | None = None,
        callbacks: bool = True,
        is_server: bool = True,
    ) -> None:
        self.identity = who or identity()
        self.is_server = is_server
        self.ring = ring or ModelRing()
        self.device = device or ModelDevice()
        self.open = False
        self.paused = True
        self.enabled = True
        self.changes = 0
        self.view_taken = False
        self.opening: SavedOpen | None = None
        self.gpadls: tuple[SavedGpadl, ...] = ()
        self.outstanding: dict[int, SavedPacket] = {}
        self.queue: deque[SavedPacket | SavedCompletion] = deque()
        self.taken: list[SavedPacket] = []
        self.next_transaction_id = 1
        self.veto: str | None = None
        self.apply_fails: Exception | None = None
        self.saver: ChannelSaver | None = None
        self.unrestored: list[SavedPacket] = []
        self.on_restore_packet: Callable[[ModelChannel, bytes, bytes], NtStatus] = self._restore_packet
        self._deferred: list[Callable[[], None]] = []
        self._callbacks = callbacks

    # --- actions of the guest ---

    def guest_opens(self) -> None:
        self.opening = SavedOpen(7, 0xE1E10, 0, 4, b"user data")
        self.gpadls = (SavedGpadl(0xE1E10, 8), SavedGpadl(0xE1E20, 4096))
        self.open = True
        self.changes += 1
        self._run()

    def guest_closes(self) -> None:
        self.open = False
        self.opening, self.gpadls = None, ()
        self._forget()
        self.changes += 1

    def guest_sends(self, packet: SavedPacket) -> None:
        self.ring.to_host.append(packet)
        self._run()

    def guest_reads(self) -> SavedPacket | SavedCompletion:
        """Take one packet off the ring; the host then sends what is queued."""
        packet = self.ring.to_guest.popleft()
        self._run()
        return packet

    def guest_completes(self, transaction_id: int) -> None:
        self.guest_sends(SavedPacket(11, 0, transaction_id, b""))

    # --- actions of the device ---

    def send(self, payload: bytes, note: bytes = b"") -> int:
        number, self.next_transaction_id = self.next_transaction_id, self.next_transaction_id + 1
        self.device.notes[number] = note
        self.queue.append(SavedPacket(6, 1, number, payload))
        self._run()
        return number

    def finish(self, transaction_id: int, payload: bytes = b"done....") -> None:
        """Complete a packet that was taken; the completion waits while a view is taken."""
        if self.view_taken:
            self._deferred.append(lambda: self.finish(transaction_id, payload))
            return
        packet = next(each for each in self.taken if each.transaction_id == transaction_id)
        self.taken.remove(packet)
        self.queue.append(SavedCompletion(transaction_id, payload))
        self._run()

    # --- SavableChannel ---

    @property
    def unsent(self) -> list[SavedPacket]:
        return [each for each in self.queue if isinstance(each, SavedPacket)]

    @property
    def completions(self) -> list[SavedCompletion]:
        return [each for each in self.queue if isinstance(each, SavedCompletion)]

    @property
    def save_packet(self) -> SavePacket | None:
        return self.device.save_packet if self._callbacks else None  # type: ignore[return-value]

    @property
    def restore_packet(self) -> RestorePacket | None:
        return self.on_restore_packet if self._callbacks else None  # type: ignore[return-value]

    def pause(self) -> None:
        self.paused = True
        self.changes += 1

    def start(self) -> None:
        self.paused = False
        self.changes += 1
        for packet in self.unrestored:
            self.device.given.append(packet)
        self.unrestored = []
        self._run()

    def disable(self) -> None:
        self.open = self.enabled = False
        self._forget()
        self.changes += 1

    def take_view(self) -> ChannelState:
        if self.device.refuses_save:
            raise DeviceError("cannot be saved now")
        self.view_taken = True
        return self.view()

    def drop_view(self) -> None:
        if not self.view_taken:
            raise InternalError("no view was taken")
        self.view_taken = False
        deferred, self._deferred = self._deferred, []
        for action in deferred:
            action()
        self._run()

    def check_restore(self, state: ChannelState) -> str | None:
        return self.veto

    def apply_restore(self, state: ChannelState) -> None:
        if self.apply_fails is not None:
            raise self.apply_fails
        header = state.channel
        self.opening, self.gpadls = header.open, header.gpadls
        self.open = bool(header.axes & ChannelAxes.OPEN)
        self.enabled = bool(header.axes & ChannelAxes.ENABLED)
        self.paused = True
        self.next_transaction_id = header.next_transaction_id
        self.outstanding = {each.packet.transaction_id: each.packet for each in state.outstanding}
        self.queue = deque(each.packet if isinstance(each, OutgoingPacket) else each for each in state.queue)
        self.taken = list(state.taken_packets())
        self.unrestored = list(state.taken_packets())
        self.device.state = state.device
        self.changes += 1

    # --- for tests ---

    def view(self) -> ChannelState:
        axes = ChannelAxes(self.enabled * 1 | self.open * 2 | self.paused * 4)
        return ChannelState(
            SavedChannel(
                self.identity,
                axes,
                relid=12,
                connection_id=0x2000C,
                max_packet_size=4096,
                transaction_quota=256,
                next_transaction_id=self.next_transaction_id,
                open=self.opening,
                gpadls=self.gpadls,
            ),
            tuple(OutgoingPacket(each) for each in self.outstanding.values()),
            tuple(OutgoingPacket(each) if isinstance(each, SavedPacket) else each for each in self.queue),
            tuple(self.taken),
            self.device.state,
        )

    def everything(self) -> object:
        """Return all state that a refusal must not change."""
        device = self.device
        return copy.deepcopy(
            (
                self.view(),
                self.ring,
                self.view_taken,
                self.paused,
                device.notes,
                device.given,
                device.restored,
                self.unrestored,
            )
        )

    def _restore_packet(self, channel: ModelChannel, library: bytes, saved: bytes) -> NtStatus:
        device = self.device
        if device.restore_script and (status := device.restore_script.pop(0)) != OK:
            return status
        if self.saver is None:
            raise InternalError("the test gave no saver")
        packet = self.saver.packet_allocate(channel)
        status = self.saver.packet_restore(packet, library)
        if status == OK and packet.state is not None:
            device.restored.append(packet.state.transaction_id)
            device.notes[packet.state.transaction_id] = saved
        return status

    def _forget(self) -> None:
        self.outstanding, self.taken = {}, []
        self.queue = deque()

    def _run(self) -> None:
        """Send what is queued and take what the guest sent, if the channel is active."""
        if self.view_taken or self.paused or not self.open:
            return
        ring = self.ring
        while self.queue and len(ring.to_guest) < ring.room:
            waiting = self.queue.popleft()
            if isinstance(waiting, SavedPacket):
                self.outstanding[waiting.transaction_id] = waiting
            ring.to_guest.append(waiting)
        while ring.to_host:
            packet = ring.to_host.popleft()
            if packet.kind == 11:
                del self.outstanding[packet.transaction_id]
                self.device.completed.append(packet.transaction_id)
            else:
                self.taken.append(packet)
                self.device.given.append(packet)


def busy_channel(who: ChannelIdentity | None = None) -> ModelChannel:
    """Return a paused channel with packets in all states: 3 sent, 2 unsent, 1 completion queued, 3 taken."""
    channel = ModelChannel(who)
    channel.device.state = b"device state"
    channel.start()
    channel.guest_opens()
    channel.guest_sends(request(0xA1, pfns=(100, 101, 102, 7, 8)))
    channel.guest_sends(request(0xA2))
    channel.guest_sends(transfer_request(0xA3))
    channel.guest_sends(request(0xA4, b"x" * 200))
    channel.send(b"host 1", note=b"note one")
    channel.send(b"host 2")
    channel.send(b"host 3")
    channel.send(b"host 4, unsent", note=b"n" * 300)
    channel.finish(0xA1)
    channel.send(b"host 5, unsent")
    channel.pause()
    return channel


def new_process(source: ModelChannel, *, callbacks: bool = True) -> ModelChannel:
    """Return the same channel in another process: the same guest memory, and a new host's end, not started."""
    return ModelChannel(source.identity, ring=copy.deepcopy(source.ring), callbacks=callbacks)


def save(saver: ChannelSaver, channel: SavableChannel, size: int = 1 << 16) -> list[bytes]:
    """Save in the loop that the KMCL documentation recommends; return the filled buffers."""
    status = saver.save_begin(channel)
    if status != OK:
        raise InternalError(f"save_begin: {status!s}")
    buffer, records = bytearray(size), []
    while True:
        status, filled, required = saver.save_continue(channel, buffer, len(buffer))
        if filled:
            records.append(bytes(buffer[:filled]))
        if status == OK:
            break
        if status == TOO_SMALL:
            buffer = bytearray(required)
        elif status != OVERFLOW:
            raise InternalError(f"save_continue: {status!s}")
    saver.save_end(channel)
    return records


def restore(saver: ChannelSaver, channel: ModelChannel, records: list[bytes]) -> list[NtStatus]:
    channel.saver = saver
    return [saver.restore_from_buffer(channel, record) for record in records]


def split(data: bytes) -> list[bytes]:
    """Return the chunks of ``data``."""
    found = []
    while data:
        size = 32 + int.from_bytes(data[24:28], "little")
        found.append(data[:size])
        data = data[size:]
    return found


def chunks(channel: ModelChannel) -> list[bytes]:
    """Return the chunks of a save with id 1."""
    return split(b"".join(save(ChannelSaver(save_ids=lambda: 1), channel)))
