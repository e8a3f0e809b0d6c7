"""Saving and restoring one channel: begin, continue, end; restoring from buffers of whole chunks.

Source: docs/protocol/saving.md#saving-a-channel, docs/protocol/saving.md#silent-cases (the KMCL functions of a VMBus
server), docs/saved-state.md.

    saving     idle ──save_begin──▶ saving ──save_continue → SUCCESS──▶ saved ──save_end──▶ idle, view kept
                                      │ save_end                                             │ start
                                      ▼                                                      ▼
                                    idle, as before save_begin                              active
    restoring  fresh ──restore → MORE_PROCESSING_REQUIRED──▶ partial ──restore → SUCCESS──▶ restored ──start──▶
                 ▲ disable (from any of them)                   │ a device's callback fails
                 └──────────────────────────── broken ◀─────────┘

A channel that is active cannot be saved: call :meth:`ChannelSaver.pause` first. From ``save_begin`` to the end of an
aborted save, or after a complete one to ``start``, the channel keeps its view: the state that was saved stays true.

A restore changes nothing until the buffer with the last chunk has been checked. Then everything is applied, and the
RestorePacket callbacks run in the order of the save. :meth:`ChannelSaver.refusal` returns why the last call on a
channel was refused. No function except ``packet_restore`` may be called from inside a packet callback.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, NamedTuple

from vmbus.errors import VmbusError
from vmbus.saving.chunks import encode
from vmbus.saving.packets import restore_packet, save_packet
from vmbus.saving.state import Assembly, ChannelState, OutgoingPacket, Packet, SavableChannel
from vmbus.saving.status import NtStatus, Reason, StateRefused
from vmbus.wire.chunk import ChunkKind
from vmbus.wire.saved import SAVED_PACKET, ChannelIdentity, SavedOutgoing, SavedPacket

_logger = logging.getLogger(__name__)

_BadBuffer = NtStatus.STATUS_INVALID_PARAMETER_2
_BadSize = NtStatus.STATUS_INVALID_PARAMETER_3
_BadState = NtStatus.STATUS_INVALID_DEVICE_STATE


class SaveResult(NamedTuple):
    """The result of SaveContinue.

    ``bytes_required``: size of the buffer that the next call needs to make progress; 0 if it is not known.
    """

    status: NtStatus
    bytes_filled: int = 0
    bytes_required: int = 0


class _Restore(Enum):
    """How far a restore is; the value is for messages."""

    FRESH = "not begun"
    PARTIAL = "incomplete"
    RESTORED = "complete"
    BROKEN = "failed: disable the channel first"


@dataclass(slots=True)
class _Save:
    """A save context.

    ``cursor``: number of chunks that were handed out. ``pending``: chunks that were built and not handed out, from
    the cursor on. ``kept_view``: whether the channel kept a view before this save.
    """

    save_id: int
    records: list[tuple[ChunkKind, Any]]
    changes: int
    kept_view: bool
    cursor: int = 0
    pending: list[bytes] = field(default_factory=list)
    invalid: bool = False

    @property
    def complete(self) -> bool:
        return self.cursor == len(self.records)


@dataclass(slots=True)
class _Context:
    channel: SavableChannel
    save: _Save | None = None
    keeps_view: bool = False
    """``channel.take_view`` was called, and ``channel.drop_view`` was not."""
    busy: bool = False
    """A callback of the device is running."""
    phase: _Restore = _Restore.FRESH
    assembly: Assembly = field(default_factory=Assembly)
    handed_over: SavedPacket | None = None
    refusal: StateRefused | None = None


class ChannelSaver:
    """The save contexts of any number of channels, which do not affect each other."""

    def __init__(self, *, save_ids: Callable[[], int] = lambda: secrets.randbits(64)) -> None:
        self._save_ids = save_ids
        self._contexts: dict[int, _Context] = {}

    # --- pause, start, disable ---

    def pause(self, channel: SavableChannel) -> NtStatus:
        """VmbChannelPause: stop taking packets. No effect on a paused channel."""
        if self._context(channel).busy:
            return self._refuse(
                channel, _BadState, "the channel cannot be paused from inside a packet callback"
            )
        if not channel.paused:
            channel.pause()
        return NtStatus.STATUS_SUCCESS

    def start(self, channel: SavableChannel) -> NtStatus:
        """VmbChannelStart: take packets again, also after a save (a migration that was cancelled) or a restore.

        ``STATUS_INVALID_DEVICE_STATE`` during a save, while chunks of a restore are missing, and after a failed
        restore.
        """
        context = self._context(channel)
        if context.busy or context.save is not None:
            return self._refuse(channel, _BadState, "the channel cannot be started during a save")
        if context.phase in (_Restore.PARTIAL, _Restore.BROKEN):
            return self._refuse(channel, _BadState, f"its restore is {context.phase.value}")
        if context.keeps_view:
            context.keeps_view = False
            channel.drop_view()
        channel.start()
        return NtStatus.STATUS_SUCCESS

    def disable(self, channel: SavableChannel) -> NtStatus:
        """VmbChannelDisable: revoke the channel, and drop a restore that is incomplete or failed.

        A save in progress fails at its next call and must still be ended.
        """
        context = self._context(channel)
        if context.busy:
            return self._refuse(
                channel, _BadState, "the channel cannot be disabled from inside a packet callback"
            )
        context.phase, context.assembly, context.keeps_view = _Restore.FRESH, Assembly(), False
        if context.save is not None:
            context.save.invalid = True
        else:
            del self._contexts[id(channel)]
        channel.disable()
        return NtStatus.STATUS_SUCCESS

    def refusal(self, channel: SavableChannel) -> StateRefused | None:
        """Return why the last call for this channel was refused, or ``None`` if it was not."""
        context = self._contexts.get(id(channel))
        return context.refusal if context else None

    def restored(self, channel: SavableChannel) -> bool:
        """Return whether a restore of this channel is complete (and the channel was not disabled since)."""
        context = self._contexts.get(id(channel))
        return context is not None and context.phase is _Restore.RESTORED

    # --- saving ---

    def save_begin(self, channel: SavableChannel) -> NtStatus:
        """VmbChannelSaveBegin: take a consistent view of a channel that is not active.

        ``STATUS_INVALID_PARAMETER_1`` for the guest's end of a channel, ``STATUS_INVALID_DEVICE_STATE`` if it is
        active, being saved, or its restore is incomplete or failed, ``STATUS_UNSUCCESSFUL`` if its device cannot be
        saved.
        """
        context = self._context(channel)
        if not channel.is_server:
            return self._refuse(
                channel,
                NtStatus.STATUS_INVALID_PARAMETER_1,
                "this is the guest's end of the channel, only the server's end can be saved and restored",
            )
        if context.busy or context.save is not None:
            return self._refuse(channel, _BadState, "a save is in progress, end it first")
        if context.phase in (_Restore.PARTIAL, _Restore.BROKEN):
            return self._refuse(channel, _BadState, f"its restore is {context.phase.value}")
        if channel.open and not channel.paused:
            return self._refuse(channel, _BadState, "the channel is active, pause it first")
        try:
            state = channel.take_view()
        except VmbusError as error:
            return self._refuse(
                channel, NtStatus.STATUS_UNSUCCESSFUL, str(error), Reason.DEVICE_FAILED, cause=error
            )
        context.save = _Save(self._save_ids(), list(state.records()), channel.changes, context.keeps_view)
        context.keeps_view = True
        context.refusal = None
        return NtStatus.STATUS_SUCCESS

    def save_continue(
        self, channel: SavableChannel, buffer: bytearray | memoryview | None, size: int
    ) -> SaveResult:
        """VmbChannelSaveContinue: write as many whole chunks as fit into the first ``size`` bytes of ``buffer``.

        ``STATUS_SUCCESS``: all chunks are written (a further call writes nothing and succeeds as well).
        ``STATUS_BUFFER_OVERFLOW``: some chunks were written, more remain. ``STATUS_BUFFER_TOO_SMALL``: nothing was
        written. Any other status, and one of the last two with 0 bytes required, is a failure of the caller or of
        the device's SavePacket callback: nothing was written, and the save can be continued.
        """
        context = self._context(channel)
        save = context.save
        if save is None or context.busy:
            return SaveResult(self._refuse(channel, _BadState, "no save is in progress, begin one first"))
        if self._changed_since_begin(context, save):
            return SaveResult(self._refuse(channel, _BadState, "the channel's state changed during the save"))
        context.refusal = None
        if save.complete:
            return SaveResult(NtStatus.STATUS_SUCCESS)
        if size < 0 or (buffer is None and size):
            status = _BadSize if size < 0 else _BadBuffer
            return SaveResult(self._refuse(channel, status, f"no buffer for {size} bytes"))
        view = memoryview(bytearray()) if buffer is None else memoryview(buffer)
        if view.readonly or not view.c_contiguous:
            return SaveResult(self._refuse(channel, _BadBuffer, "the buffer is read-only or not contiguous"))
        if size > view.nbytes:
            return SaveResult(self._refuse(channel, _BadSize, f"{size} bytes of a {view.nbytes}-byte buffer"))
        return self._fill(context, save, view.cast("B")[:size])

    def save_end(self, channel: SavableChannel) -> None:
        """VmbChannelSaveEnd: drop the context. After an incomplete save the channel is as before ``save_begin``.

        After a complete save it keeps its view until :meth:`start` or :meth:`save_cancel`. Without a save in
        progress this only logs a line.
        """
        context = self._context(channel)
        if context.save is None or context.busy:
            _logger.info("%s: SaveEnd without a save in progress", channel.identity)
            return
        save, context.save = context.save, None
        if not save.complete or save.invalid:
            self._drop_view(context, unless=save.kept_view)

    def save_cancel(self, channel: SavableChannel) -> None:
        """Undo a save, complete or not: the channel is as before ``save_begin``, and is not started.

        This is not a KMCL function. It is for a caller that saves several channels and fails at one of them.
        """
        context = self._context(channel)
        if context.busy:
            _logger.warning("%s: a save cannot be cancelled from inside a packet callback", channel.identity)
            return
        save, context.save = context.save, None
        self._drop_view(context, unless=save is not None and save.kept_view)

    def chunks_saved(self, channel: SavableChannel) -> int:
        """Return how many chunks of the save in progress were handed out."""
        save = self._context(channel).save
        return save.cursor if save is not None else 0

    def _fill(self, context: _Context, save: _Save, view: memoryview) -> SaveResult:
        """Build the chunks first, then write them: a SavePacket callback that fails leaves the buffer unchanged."""
        fitting = filled = 0
        required = 0
        while save.cursor + fitting < len(save.records):
            status = self._render(context, save, fitting)
            if status != NtStatus.STATUS_SUCCESS:
                return SaveResult(status)
            required = len(save.pending[fitting])
            if filled + required > len(view):
                break
            filled += required
            fitting += 1
            required = 0
        if self._changed_since_begin(context, save):
            return SaveResult(
                self._refuse(context.channel, _BadState, "a SavePacket callback changed the channel's state")
            )
        view[:filled] = b"".join(save.pending[:fitting])
        del save.pending[:fitting]
        save.cursor += fitting
        if save.complete:
            return SaveResult(NtStatus.STATUS_SUCCESS, filled)
        if not fitting:
            return SaveResult(NtStatus.STATUS_BUFFER_TOO_SMALL, 0, required)
        return SaveResult(NtStatus.STATUS_BUFFER_OVERFLOW, filled, required)

    def _render(self, context: _Context, save: _Save, ahead: int) -> NtStatus:
        """Build chunk ``cursor + ahead`` unless it is pending already."""
        if ahead < len(save.pending):
            return NtStatus.STATUS_SUCCESS
        index = save.cursor + ahead
        kind, record = save.records[index]
        if isinstance(record, OutgoingPacket):
            context.busy = True
            try:
                blob = save_packet(context.channel, record.packet)
            except StateRefused as error:
                return self._refuse(context.channel, error.status, error.detail, error.reason)
            finally:
                context.busy = False
            record = SavedOutgoing(SAVED_PACKET.build(record.packet), blob)
        last = index + 1 == len(save.records)
        save.pending.append(encode(kind, record, save_id=save.save_id, index=index, last=last))
        return NtStatus.STATUS_SUCCESS

    def _changed_since_begin(self, context: _Context, save: _Save) -> bool:
        """Return whether the channel changed after ``save_begin``; the save is invalid then."""
        channel = context.channel
        if channel.changes != save.changes or (channel.open and not channel.paused):
            save.invalid = True
        return save.invalid

    def _drop_view(self, context: _Context, *, unless: bool) -> None:
        """Let the channel drop its view, unless an earlier save keeps it."""
        if context.keeps_view and not unless:
            context.channel.drop_view()
        context.keeps_view = context.keeps_view and unless

    # --- restoring ---

    def restore_from_buffer(
        self, channel: SavableChannel, buffer: bytes | bytearray | memoryview | None, size: int | None = None
    ) -> NtStatus:
        """VmbChannelRestoreFromBuffer: take the whole chunks in the first ``size`` bytes (all if ``None``).

        ``STATUS_MORE_PROCESSING_REQUIRED``: the chunks were accepted, more are expected. ``STATUS_SUCCESS``: the last
        chunk was accepted, the channel is restored and paused. Any other status is a failure: no chunk of this buffer
        was taken and nothing has changed, unless a callback of the device failed. Then the channel is unusable until
        it is disabled.
        """
        context = self._context(channel)
        try:
            return self._restore(context, buffer, size)
        except StateRefused as error:
            if error.changed:
                context.phase, context.assembly = _Restore.BROKEN, Assembly()
            return self._refuse(channel, error.status, error.detail, error.reason, cause=error)

    def check_restore(self, channel: SavableChannel, state: ChannelState) -> None:
        """Make all checks of a restore of ``state`` and change nothing. Raises :class:`StateRefused`."""
        context = self._context(channel)
        self._check_ready(context)
        if context.phase is not _Restore.FRESH:
            raise StateRefused(
                Reason.WRONG_STATE, "another restore is in progress, disable the channel first", _BadState
            )
        self._check_channel(channel, state.channel.identity, has_packets=bool(state.outgoing()))
        self._check_state(channel, state)

    def restore_checked(self, channel: SavableChannel, state: ChannelState) -> None:
        """Restore a channel from a whole state that :meth:`check_restore` has just accepted; it is paused then.

        Does what :meth:`restore_from_buffer` does for the state's chunks, without reading and checking them again: a
        guest stands still meanwhile. Raises :class:`StateRefused`; if its ``changed`` is true, the channel is
        unusable until it is disabled.
        """
        context = self._context(channel)
        try:
            self._apply(context, state)
        except StateRefused as error:
            if error.changed:
                context.phase = _Restore.BROKEN
            self._refuse(channel, error.status, error.detail, error.reason, cause=error)
            raise
        context.assembly, context.phase, context.refusal = Assembly(), _Restore.RESTORED, None

    def packet_allocate(self, channel: SavableChannel) -> Packet:
        """VmbPacketAllocate: return a new packet object for a RestorePacket callback to fill."""
        return Packet(channel)

    def packet_restore(self, packet: Packet, buffer: bytes | bytearray | memoryview) -> NtStatus:
        """VmbPacketRestore: fill a new packet with the library state that the running callback was given.

        ``STATUS_INVALID_PARAMETER_1`` for a packet that is filled already, ``STATUS_INVALID_PARAMETER_2`` for other
        bytes than those of the callback, ``STATUS_INVALID_DEVICE_STATE`` outside of a RestorePacket callback.
        """
        context = self._contexts.get(id(packet.channel))
        if context is None or context.handed_over is None:
            return _BadState
        if packet.state is not None:
            return NtStatus.STATUS_INVALID_PARAMETER_1
        if bytes(buffer) != SAVED_PACKET.build(context.handed_over):
            return _BadBuffer
        packet.state, context.handed_over = context.handed_over, None
        return NtStatus.STATUS_SUCCESS

    def _restore(
        self, context: _Context, buffer: bytes | bytearray | memoryview | None, size: int | None
    ) -> NtStatus:
        channel = context.channel
        self._check_ready(context)
        if buffer is None:
            raise StateRefused(Reason.WRONG_STATE, "no buffer was given", _BadBuffer)
        data = bytes(buffer)
        size = len(data) if size is None else size
        if not 0 < size <= len(data):
            raise StateRefused(Reason.WRONG_STATE, f"{size} bytes of a {len(data)}-byte buffer", _BadSize)
        assembly = context.assembly.take(data[:size])
        if assembly.header is not None:
            self._check_channel(channel, assembly.header.identity, has_packets=assembly.has_packets)
        if not assembly.complete:
            context.assembly, context.phase, context.refusal = assembly, _Restore.PARTIAL, None
            return NtStatus.STATUS_MORE_PROCESSING_REQUIRED
        state = assembly.state()
        self._check_state(channel, state)
        self._apply(context, state)
        context.assembly, context.phase, context.refusal = Assembly(), _Restore.RESTORED, None
        return NtStatus.STATUS_SUCCESS

    def _check_ready(self, context: _Context) -> None:
        channel = context.channel
        if not channel.is_server:
            raise StateRefused(
                Reason.WRONG_STATE,
                "this is the guest's end of the channel, only the server's end can be saved and restored",
                NtStatus.STATUS_INVALID_PARAMETER_1,
            )
        if context.busy or context.save is not None or context.keeps_view:
            raise StateRefused(
                Reason.WRONG_STATE,
                "the channel is being saved or keeps the view of a save, start it first",
                _BadState,
            )
        if context.phase in (_Restore.RESTORED, _Restore.BROKEN):
            raise StateRefused(Reason.WRONG_STATE, f"its restore is {context.phase.value}", _BadState)
        if channel.open or not channel.paused:
            raise StateRefused(
                Reason.WRONG_STATE,
                "the channel is open or active, a restore needs a closed and paused one",
                _BadState,
            )

    def _check_channel(
        self, channel: SavableChannel, identity: ChannelIdentity, *, has_packets: bool
    ) -> None:
        if identity != channel.identity:
            raise StateRefused(
                Reason.FOREIGN_CHANNEL,
                f"the state is of channel {identity}, this is channel {channel.identity}",
            )
        if has_packets and channel.restore_packet is None:
            raise StateRefused(
                Reason.NO_RESTORE_CALLBACK,
                "the state has packets, and the device has no RestorePacket callback",
                NtStatus.STATUS_NOT_SUPPORTED,
            )

    def _check_state(self, channel: SavableChannel, state: ChannelState) -> None:
        why = channel.check_restore(state)
        if why is not None:
            raise StateRefused(Reason.NOT_ACCEPTED, why)

    def _apply(self, context: _Context, state: ChannelState) -> None:
        channel = context.channel
        context.busy = True
        try:
            channel.apply_restore(state)
            for outgoing in state.outgoing():
                context.handed_over = outgoing.packet
                restore_packet(channel, outgoing, taken=lambda: context.handed_over is None)
        except StateRefused:
            raise
        except Exception as error:
            _logger.exception("%s: restoring raised an exception", channel.identity)
            raise StateRefused(
                Reason.DEVICE_FAILED, f"{error!r}", NtStatus.STATUS_UNSUCCESSFUL, changed=True
            ) from error
        finally:
            context.busy, context.handed_over = False, None

    # --- saving and restoring ---

    def _context(self, channel: SavableChannel) -> _Context:
        # The context holds the channel, so that the id cannot become another object's.
        found = self._contexts.get(id(channel))
        if found is None:
            found = self._contexts[id(channel)] = _Context(channel)
        return found

    def _refuse(
        self,
        channel: SavableChannel,
        status: NtStatus,
        detail: str,
        reason: Reason = Reason.WRONG_STATE,
        *,
        cause: VmbusError | None = None,
    ) -> NtStatus:
        """Store and log a refusal; its cause is the caller, the device or the source, never the guest."""
        if isinstance(cause, StateRefused):
            reason, detail = cause.reason, cause.detail
        self._context(channel).refusal = StateRefused(reason, detail, status)
        _logger.info("%s: %s (%s): %s", channel.identity, reason, status, detail)
        return status
