"""Messages for the guest, and the slots of the message page that they are written to.

Source: docs/protocol/discovery.md#message-page, docs/protocol/discovery.md#message-delivery, TLFS 11.8.

A slot of the message page holds one message. The guest frees it by clearing the type word, and writes EOM if it
finds the ``pending`` flag set. Guest processors run while the host writes, so the order of stores matters:

    slot free    store payload, size, flags; fence; store the type          -> delivered, interrupt
    slot in use  store the pending flag; fence; load the type once more     -> wait for EOM, or as above if freed

The second load closes the race in which the guest frees the slot before it can see the flag.

A host that keeps a journal has to find out after its death whether a message was delivered, also if the guest has
taken it since. It gives each message a *mark*, in the reserved field of the header, which guests leave alone: the
first eight bytes, type and mark among them, are one store.
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
    """A channel message, or the message of an expired synthetic timer (its payload is built on delivery).

    ``timer``: the timer's index, None for a channel message; ``expiration``: reference time in units of 100 ns.
    """

    message_type: int
    payload: bytes = b""
    timer: int | None = None
    expiration: int = 0


_PENDING = bytes((MESSAGE_PENDING,))
_HEADER = 8
"""Bytes of a slot that are stored at once: type, size, flags, and the mark in the last two."""
MAX_MARK = 0xFFFF


def slot_is_free(page: GuestPages, sint: int) -> bool:
    """Return whether the slot of ``sint`` may be written."""
    return page.load_u32(sint * MESSAGE_SLOT_SIZE) == MessageType.NONE


def claim_slot(page: GuestPages, sint: int, memory: GuestMemory) -> bool:
    """Return whether the slot of ``sint`` is free; if not, set its pending flag, so that the guest writes EOM."""
    if slot_is_free(page, sint):
        return True
    page.write(sint * MESSAGE_SLOT_SIZE + SLOT_FLAGS_OFFSET, _PENDING)
    memory.fence()
    return slot_is_free(page, sint)


def mark_of(page: GuestPages, sint: int) -> int:
    """Return the mark of the message that was last written to the slot of ``sint``; 0 if it has none."""
    return page.load_u32(sint * MESSAGE_SLOT_SIZE + SLOT_TYPE_SIZE) >> 16


def fill_slot(
    page: GuestPages,
    sint: int,
    message_type: int,
    payload: bytes,
    memory: GuestMemory,
    *,
    more: bool,
    mark: int = 0,
) -> None:
    """Write a message to a free slot; ``more``: other messages are queued behind it. ``mark``: 1 to 65,535, or none.

    All 240 payload bytes are written, so that nothing of an earlier message remains.
    """
    base = sint * MESSAGE_SLOT_SIZE
    flags = MESSAGE_PENDING if more else 0
    image = MESSAGE_SLOT_STRUCT.pack(
        message_type, len(payload), flags, 0, payload.ljust(MESSAGE_PAYLOAD_MAX, b"\0")
    )
    if mark:
        page.write(base + _HEADER, image[_HEADER:])
        memory.fence()
        page.write(base, image[: _HEADER - 2] + mark.to_bytes(2, "little"))
        return
    page.write(base + SLOT_TYPE_SIZE, image[SLOT_TYPE_SIZE:])
    memory.fence()
    page.store_u32(base, message_type)
