"""The callbacks of a device for its outgoing packets: SavePacket and RestorePacket.

Source: docs/protocol/saving.md#packet-callbacks. SavePacket is asked with an empty buffer; one that
needs room says how much, and is asked again with that; it may change its mind ``SAVE_PACKET_RETRIES`` times.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from vmbus.saving.refusal import Reason, StateRefused
from vmbus.saving.state import OutgoingPacket, SavableChannel
from vmbus.saving.status import NtStatus
from vmbus.wire.saved import SAVED_PACKET, SavedPacket

_logger = logging.getLogger(__name__)

SAVE_PACKET_RETRIES = 3
"""How often a SavePacket callback may ask for yet more room than it was given."""

MAX_PACKET_BLOB = 1 << 24
"""Most bytes that a SavePacket callback may ask for."""


def save_packet(channel: SavableChannel, packet: SavedPacket) -> bytes:
    """What the device keeps about ``packet``; nothing if it registered no callback.

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
            _logger.exception("%s: SavePacket raised", channel.identity)
            status, needed = NtStatus.STATUS_UNSUCCESSFUL, 0
        if status == NtStatus.STATUS_SUCCESS:
            if 0 <= needed <= len(buffer):
                return bytes(buffer[:needed])
            status, needed = NtStatus.STATUS_UNSUCCESSFUL, 0
        if not len(buffer) < needed <= MAX_PACKET_BLOB:
            break
        buffer = bytearray(needed)
    detail = f"SavePacket for transaction {packet.transaction_id:#x}: {status!s}"
    raise StateRefused(Reason.DEVICE_FAILED, detail, status)


def restore_packet(channel: SavableChannel, outgoing: OutgoingPacket, *, taken: Callable[[], bool]) -> None:
    """Have the device take ``outgoing``. ``taken``: whether VmbPacketRestore has made a packet object of it.

    Raises :class:`StateRefused` with the callback's status; a callback that succeeds and has lost the packet has
    failed as well.
    """
    callback = channel.restore_packet
    status = NtStatus.STATUS_NOT_SUPPORTED
    if callback is not None:
        status = callback(channel, SAVED_PACKET.build(outgoing.packet), outgoing.device)
    if status == NtStatus.STATUS_SUCCESS and not taken():
        status = NtStatus.STATUS_UNSUCCESSFUL
    if status != NtStatus.STATUS_SUCCESS:
        detail = f"RestorePacket for transaction {outgoing.packet.transaction_id:#x}: {status!s}"
        raise StateRefused(Reason.DEVICE_FAILED, detail, status, changed=True)
