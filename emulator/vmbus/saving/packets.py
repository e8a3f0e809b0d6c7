"""Calls of a device's packet callbacks, SavePacket and RestorePacket, for its outgoing packets.

Source: docs/protocol/saving.md#packet-callbacks. SavePacket is called with an empty buffer first. If it needs a
buffer it returns the size, and is called again with one; it may ask for a larger one ``SAVE_PACKET_RETRIES`` times.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from vmbus.saving.state import OutgoingPacket, SavableChannel
from vmbus.saving.status import NtStatus, Reason, StateRefused
from vmbus.wire.saved import SAVED_PACKET, SavedPacket

_logger = logging.getLogger(__name__)

SAVE_PACKET_RETRIES = 3
"""How often a SavePacket callback may ask for a larger buffer than the one it asked for first."""

MAX_PACKET_BLOB = 1 << 24
"""Bytes that a SavePacket callback may ask for."""


def save_packet(channel: SavableChannel, packet: SavedPacket) -> bytes:
    """Call SavePacket for ``packet``; return the device's state of it, empty without a callback.

    Raises :class:`StateRefused` with the callback's status.
    """
    callback = channel.save_packet
    if callback is None:
        return b""
    buffer = bytearray()
    # The call with an empty buffer, the one with what it asked for, and the retries.
    for _ in range(2 + SAVE_PACKET_RETRIES):
        try:
            status, needed = callback(channel, packet, memoryview(buffer))
        except Exception:
            _logger.exception("%s: SavePacket raised an exception", channel.identity)
            status, needed = NtStatus.STATUS_UNSUCCESSFUL, 0
        if status == NtStatus.STATUS_SUCCESS:
            if 0 <= needed <= len(buffer):
                return bytes(buffer[:needed])
            status, needed = NtStatus.STATUS_UNSUCCESSFUL, 0
        if not len(buffer) < needed <= MAX_PACKET_BLOB:
            break
        buffer = bytearray(needed)
    detail = f"SavePacket for transaction {packet.transaction_id:#x} returned {status!s}"
    raise StateRefused(Reason.DEVICE_FAILED, detail, status)


def restore_packet(channel: SavableChannel, outgoing: OutgoingPacket, *, taken: Callable[[], bool]) -> None:
    """Call RestorePacket for ``outgoing``. ``taken`` returns whether VmbPacketRestore has filled a packet object.

    Raises :class:`StateRefused` with the callback's status; a callback that succeeds without VmbPacketRestore has
    lost the packet and counts as failed.
    """
    callback = channel.restore_packet
    status = NtStatus.STATUS_NOT_SUPPORTED
    if callback is not None:
        status = callback(channel, SAVED_PACKET.build(outgoing.packet), outgoing.device)
    if status == NtStatus.STATUS_SUCCESS and not taken():
        status = NtStatus.STATUS_UNSUCCESSFUL
    if status != NtStatus.STATUS_SUCCESS:
        detail = f"RestorePacket for transaction {outgoing.packet.transaction_id:#x} returned {status!s}"
        raise StateRefused(Reason.DEVICE_FAILED, detail, status, changed=True)
