"""Messages that wait for their slot, and the slot itself.

Source: docs/protocol/discovery.md#message-page, docs/protocol/discovery.md#message-delivery, TLFS 11.8.

A slot of the message page holds one message; the guest frees it by clearing the type word, and writes EOM if it
finds the ``pending`` flag set. Guest processors run while the host writes, so the order of stores matters:

    slot free    payload, size, flags; fence; type last             -> WRITTEN, interrupt
    slot in use  pending flag; fence; look at the type once more    -> BUSY, or as above if freed meanwhile

The second look closes the gap in which the guest frees the slot before it can see the flag.
"""

from __future__ import annotations

from dataclasses import dataclass

from vmbus.ports import GuestMemory, GuestPages
from vmbus.wire.synic import (
    MESSAGE_PAYLOAD_MAX,
    MESSAGE_PENDING,
    MESSAGE_SLOT_SIZE,
    MESSAGE_SLOT_STRUCT,
    SLOT_FLAGS_OFFSET,
    SLOT_TYPE_SIZE,
    MessageType,
)


@dataclass(frozen=True, slots=True)
class Message:
    """A channel message, or the notice that a synthetic timer expired (its payload is made on delivery)."""

    message_type: int
    payload: bytes = b""
    timer: int | None = None
    expiration: int = 0


_PENDING = bytes((MESSAGE_PENDING,))


def slot_is_free(page: GuestPages, sint: int) -> bool:
    """Whether the slot of ``sint`` may be written."""
    return page.load_u32(sint * MESSAGE_SLOT_SIZE) == MessageType.NONE


def claim_slot(page: GuestPages, sint: int, memory: GuestMemory) -> bool:
    """Whether the slot is free; if not, the guest is asked for an EOM."""
    if slot_is_free(page, sint):
        return True
    page.write(sint * MESSAGE_SLOT_SIZE + SLOT_FLAGS_OFFSET, _PENDING)
    memory.fence()
    return slot_is_free(page, sint)


def fill_slot(
    page: GuestPages, sint: int, message_type: int, payload: bytes, memory: GuestMemory, *, more: bool
) -> None:
    """Write a free slot; ``more``: other messages wait behind this one. All 240 payload bytes are written."""
    base = sint * MESSAGE_SLOT_SIZE
    flags = MESSAGE_PENDING if more else 0
    image = MESSAGE_SLOT_STRUCT.pack(
        message_type, len(payload), flags, 0, payload.ljust(MESSAGE_PAYLOAD_MAX, b"\0")
    )
    page.write(base + SLOT_TYPE_SIZE, image[SLOT_TYPE_SIZE:])
    memory.fence()
    page.store_u32(base, message_type)
