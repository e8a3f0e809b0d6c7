"""Saves and restores one channel of a running guest, and keeps what every call returned: for ``vmbus channel``.

Source: docs/protocol/saving.md#saving-a-channel, docs/saved-state.md#one-channel-by-hand.

    active --pause--> paused --save (any number of times)--> paused --restore--> restored --start--> active
                                                                     refused --> paused, as before

A restore puts the device's end of the channel into the state of a new process first. The guest's end is not involved,
and guest memory is not written: the ring continues where it was, with the requests of the state. If any part of the
restore is refused, the device's end gets back what it had.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from vmbus.bus.channel.state import ChannelState as BusState
from vmbus.saving.channel import ChannelSaver
from vmbus.saving.device_channel import DeviceChannel
from vmbus.saving.state import Assembly, ChannelState
from vmbus.saving.status import NtStatus, Reason, StateRefused
from vmbus.saving.stream import BUFFER_SIZE
from vmbus.wire.chunk import CHUNK_HEADER, HEADER_SIZE, MAGIC

MAX_STATE = 64 << 20
"""Bytes of one channel's state that are restored by hand."""

_OK = NtStatus.STATUS_SUCCESS
_SETTLED = (BusState.OPEN, BusState.CLOSED, BusState.RELEASED, BusState.REVOKED, BusState.REOFFERED)
"""States of a channel in which no call of its endpoint is unfinished."""


@dataclass(frozen=True, slots=True)
class Call:
    """One call of a KMCL function. ``None`` for what the function does not have; sizes in bytes."""

    function: str
    status: NtStatus | None
    size: int | None = None
    filled: int | None = None
    required: int | None = None

    def as_dict(self) -> dict[str, object]:
        """Return the call for JSON."""
        return {
            "function": self.function,
            "status": None if self.status is None else self.status.name,
            "value": None if self.status is None else int(self.status),
            "size": self.size,
            "filled": self.filled,
            "required": self.required,
        }


@dataclass(frozen=True, slots=True)
class Outcome:
    """All calls of one save or restore; ``data``: the chunks of a save that succeeded."""

    calls: tuple[Call, ...]
    refusal: StateRefused | None = None
    data: bytes = b""


def save(saver: ChannelSaver, channel: DeviceChannel, buffer_size: int = BUFFER_SIZE) -> Outcome:
    """Save a paused channel, with a buffer of ``buffer_size`` bytes that grows when a chunk needs more."""
    status = saver.save_begin(channel)
    calls = [Call("VmbChannelSaveBegin", status)]
    if status != _OK:
        return Outcome(tuple(calls), saver.refusal(channel))
    buffer = bytearray(buffer_size)
    filled = bytearray()
    refusal: StateRefused | None = None
    while True:
        found = saver.save_continue(channel, buffer, len(buffer))
        calls.append(Call("VmbChannelSaveContinue", found.status, len(buffer), *found[1:]))
        filled += buffer[: found.bytes_filled]
        if found.status == _OK:
            break
        if found.status == NtStatus.STATUS_BUFFER_TOO_SMALL and found.bytes_required > len(buffer):
            buffer = bytearray(found.bytes_required)
        elif found.status != NtStatus.STATUS_BUFFER_OVERFLOW or not found.bytes_filled:
            refusal = saver.refusal(channel) or _refused(found.status)
            break
    saver.save_end(channel)
    calls.append(Call("VmbChannelSaveEnd", None))
    return Outcome(tuple(calls), refusal, b"" if refusal else bytes(filled))


def restore(
    saver: ChannelSaver, channel: DeviceChannel, data: bytes, buffer_size: int = BUFFER_SIZE
) -> Outcome:
    """Replace the state of a paused channel by ``data``, passed in buffers of whole chunks.

    A buffer has as many chunks as fit into ``buffer_size`` bytes, at least one. If anything is refused, the channel
    is as before. The state must be that of the channel now: one that was saved before the channel ran again has
    requests that are completed by now, or lacks some.
    """
    if not channel.paused:
        return _refusal("the channel is active, pause it first")
    if channel.channel.state not in _SETTLED:
        return _refusal(f"the channel is {channel.channel.state.value}, wait until that has ended")
    before = save(saver, channel)
    if before.refusal is not None:
        return before
    saver.save_cancel(channel)
    saver.disable(channel)
    channel.detach()
    calls, refusal = _feed(saver, channel, data, buffer_size)
    if refusal is None and (why := _difference(_state(before.data), _state(data))):
        refusal = StateRefused(
            Reason.NOT_ACCEPTED,
            f"{why}: the channel has run since this state was saved, which would lose requests or repeat "
            "answers; save it again",
        )
    if refusal is not None:
        saver.disable(channel)
        _, lost = _feed(saver, channel, before.data, BUFFER_SIZE)
        if lost is not None:
            refusal = StateRefused(
                refusal.reason,
                f"{refusal.detail}; and the channel has lost its state ({lost}), it is offered anew at its start",
                refusal.status,
                changed=True,
            )
    return Outcome(tuple(calls), refusal)


def whole_chunks(data: bytes, size: int) -> Iterator[bytes]:
    """Yield ``data`` in buffers of whole chunks: as many as fit into ``size`` bytes, at least one.

    Bytes that are no chunk are passed on as they are: whoever reads them says what is wrong.
    """
    start = at = 0
    while at < len(data):
        end = _end_of_chunk(data, at)
        if at > start and end - start > size:
            yield data[start:at]
            start = at
        at = end
    if start < at:
        yield data[start:at]


def _end_of_chunk(data: bytes, at: int) -> int:
    if not data.startswith(MAGIC, at) or len(data) - at < HEADER_SIZE:
        return len(data)
    length = CHUNK_HEADER.parse(data[at : at + HEADER_SIZE]).length
    return min(len(data), at + HEADER_SIZE + length)


def _feed(
    saver: ChannelSaver, channel: DeviceChannel, data: bytes, size: int
) -> tuple[list[Call], StateRefused | None]:
    calls = []
    status = NtStatus.STATUS_INVALID_PARAMETER_3
    for buffer in whole_chunks(data, size):
        status = saver.restore_from_buffer(channel, buffer)
        calls.append(Call("VmbChannelRestoreFromBuffer", status, len(buffer)))
        if status not in (_OK, NtStatus.STATUS_MORE_PROCESSING_REQUIRED):
            return calls, saver.refusal(channel) or _refused(status)
    if status == _OK:
        return calls, None
    return calls, StateRefused(Reason.TRUNCATED, f"the last chunk is missing after {len(data)} bytes")


def _state(data: bytes) -> ChannelState:
    return Assembly().take(data).state()


def _difference(here: ChannelState, there: ChannelState) -> str:
    """Return what differs in what the guest waits for; empty if nothing does."""
    for what, one, other in (
        ("open parameters", here.channel.open, there.channel.open),
        ("GPADLs", set(here.channel.gpadls), set(there.channel.gpadls)),
        (
            "requests that were taken and not completed",
            Counter(each.transaction_id for each in here.taken_packets()),
            Counter(each.transaction_id for each in there.taken_packets()),
        ),
        (
            "packets that wait for a completion of the guest",
            Counter(each.packet.transaction_id for each in here.outstanding),
            Counter(each.packet.transaction_id for each in there.outstanding),
        ),
        ("packets that wait for room in the ring", here.queue, there.queue),
    ):
        if one != other:
            return f"its {what} are not those of the channel now"
    return ""


def _refused(status: NtStatus) -> StateRefused:
    return StateRefused(Reason.DEVICE_FAILED, f"the call returned {status!s}", status)


def _refusal(detail: str) -> Outcome:
    return Outcome((), StateRefused(Reason.WRONG_STATE, detail, NtStatus.STATUS_INVALID_DEVICE_STATE))
