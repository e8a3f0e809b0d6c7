"""A storage controller's channel with reads under way that wait, so that they are saved with it."""

from __future__ import annotations

import random
import struct
from collections.abc import Iterator
from contextlib import contextmanager

from vmbus.bus.budget import MemoryBudget
from vmbus.bus.channel.gpadl import Gpadl
from vmbus.saving import ChannelSaver
from vmbus.saving.device_channel import DeviceChannel
from vmbus.testing.fakes import FakeMemory
from vmbus_devices.scsi.faults import FaultPlan, parse_faults

from tests.unit.saving.test_device_channel import RestorableChannel
from tests.unit.scsi.scsi_guest import ScsiGuest, controller, memory_disk

MOST_PAGES = 128
"""Pages of one read."""
_RING_PAGES = 128
_MEMORY = 64 << 20
_RING_GPADL = 0xE1E10


class _Unlimited(MemoryBudget):
    """A budget that no packet has to wait for."""

    @property
    def full(self) -> bool:
        return False


@contextmanager
def storage_channel() -> Iterator[tuple[ScsiGuest, DeviceChannel, ChannelSaver]]:
    """A guest that has negotiated with a controller, whose disk delays every read, and what saves the channel."""
    disk = memory_disk(MOST_PAGES * 8, faults=FaultPlan(parse_faults("delay:60@*")))
    disk.transfer_limit = MOST_PAGES << 12
    memory = FakeMemory(_MEMORY)
    device = controller(disk, transfer=MOST_PAGES << 2)
    with ScsiGuest(device, memory=memory, ring_pages=_RING_PAGES, budget=_Unlimited()) as guest:
        channel = RestorableChannel(guest.device.offer(), guest.channel)
        channel.gpadls[_RING_GPADL] = Gpadl(_RING_GPADL, ())
        channel.endpoint = guest.io
        saver = ChannelSaver()
        yield guest, DeviceChannel(saver, channel, guest.io), saver


def send_reads(guest: ScsiGuest, requests: int, pages: int) -> None:
    """Have the guest send reads of ``pages`` pages each, which lie scattered."""
    numbers = random.Random(1)
    blocks = pages * 8
    cdb = struct.pack(">BBIBHB", 0x28, 0, 0, 0, blocks, 0)
    payload = guest.srb(cdb, length=blocks * 512, direction=1)
    for number in range(requests):
        ranges = [(pages << 12, 0, numbers.sample(range(4096, _MEMORY >> 12), pages))]
        assert guest.send(payload, transaction_id=1000 + number, completion_requested=True, ranges=ranges)
    assert guest.io.status()["owed"] == requests
