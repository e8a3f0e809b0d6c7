"""Guest memory that is not copied: how the target checks that it maps the guest's file, as the guest left it.

With ``x-ignore-shared`` and in the mode ``cpr-transfer`` QEMU sends no guest memory: the target opens the same
file. QEMU checks neither the file nor its contents. So the source's state identifies the file (device, inode, size,
valid until the host reboots) and has a digest of pages: those that host and guest change all the time (the first of
each ring), those that the host wrote last, and a thousand more, evenly spread. Another guest's file, an empty file, a
copy that was made too early, and memory in which the guest ran on after its state was saved are all refused before
anything is restored.
"""

from __future__ import annotations

import hashlib
import itertools
import secrets
from collections.abc import Iterable
from pathlib import Path
from uuid import UUID

from vmbus.bus.channel.channel import Channel
from vmbus.bus.channel.opening import split_rings
from vmbus.errors import ProtocolError
from vmbus.machine.memory import MappedMemory
from vmbus.ports import PAGE_SIZE
from vmbus.saving import Reason, StateRefused
from vmbus.wire.saved import SavedMemory

_SPREAD = 1024
"""Pages in the digest that are spread over memory; 4 MiB, some milliseconds."""

_LAST_WRITTEN = 256


def boot_id() -> UUID:
    """Return the id of this boot of this host."""
    return UUID(Path("/proc/sys/kernel/random/boot_id").read_text().strip())


def describe(memory: MappedMemory, channels: Iterable[Channel]) -> SavedMemory:
    """Return what the target has to find. The guest is stopped and the host is paused.

    Raises :class:`~vmbus.saving.StateRefused` for memory without a file.
    """
    file = memory.file
    if file is None:
        raise StateRefused(Reason.WRONG_STATE, "guest memory cannot stay where it is: it is not in a file")
    pages = sorted({*_shared(memory, channels), *itertools.islice(memory.written(), _LAST_WRITTEN)})
    step = max(file.size // PAGE_SIZE // _SPREAD, 1)
    first = secrets.randbelow(step)
    digest = _digest(memory, pages, first, step)
    return SavedMemory(boot_id(), file.device, file.inode, file.size, tuple(pages), first, step, digest)


def check(saved: SavedMemory, memory: MappedMemory) -> None:
    """Raise :class:`~vmbus.saving.StateRefused` if ``memory`` is not what ``saved`` describes."""
    file = memory.file
    if file is None or file.size != saved.size:
        found = "no file" if file is None else f"{file.size} bytes"
        raise StateRefused(
            Reason.NOT_ACCEPTED,
            f"guest memory stays in its file of {saved.size} bytes, and the target has {found}",
        )
    here = (file.device, file.inode)
    if saved.boot == boot_id() and here != (saved.device, saved.inode):
        raise StateRefused(
            Reason.NOT_ACCEPTED,
            f"guest memory was not copied, and is in another file (inode {saved.inode}, here {file.inode}): start "
            "the target with the source's mem-path, or let memory be copied",
        )
    count = file.size // PAGE_SIZE
    if not saved.step or any(page >= count for page in saved.pages) or saved.first >= count:
        raise StateRefused(Reason.INCONSISTENT, f"pages beyond the {count} of guest memory")
    if _digest(memory, saved.pages, saved.first, saved.step) != saved.digest:
        raise StateRefused(
            Reason.NOT_ACCEPTED,
            "guest memory was not copied, and is not as the guest left it: it is the memory of another guest, or "
            "the guest ran on after its state was saved",
        )


def _shared(memory: MappedMemory, channels: Iterable[Channel]) -> Iterable[int]:
    """Yield the first page of each ring: its indices change with each packet."""
    for channel in channels:
        if channel.request is None:
            continue
        try:
            pfns, downstream = split_rings(channel.request, channel.gpadls)
        except ProtocolError:  # the channel cannot be opened
            continue
        for pfn in (pfns[0], pfns[downstream]):
            yield memory.page_of_gpa(pfn * PAGE_SIZE)


def _digest(memory: MappedMemory, pages: Iterable[int], first: int, step: int) -> bytes:
    found = hashlib.blake2b(digest_size=32)
    count = len(memory.dirty)
    for page in itertools.chain(pages, range(first, count, step)):
        found.update(memory.read_page(page))
    return found.digest()
