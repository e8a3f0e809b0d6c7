"""From a guest program's packet to the device, and from the device's answer to the guest program.

A program on ``uio_hv_generic`` sends packets with its TSC in them; the device compares that with the guest's TSC as
the gateway's clock knows it (exact to a microsecond or so), and the next packet tells when the answer was seen.

    to the device     from before the packet is put on the ring until the device's packet() is called:
                      write() on /dev/uioN, the kernel's hypercall, the gateway, the emulator's event loop, the ring
    to the guest      from the device's answer until poll() and read() have returned in the program:
                      the ring, qtest, QEMU's main loop, the guest's interrupt handler and its scheduler
"""

from __future__ import annotations

import asyncio
import struct
import uuid

from vmbus.bus.io.channel_io import ChannelIo
from vmbus.bus.io.device import Device
from vmbus.bus.offers import Offer
from vmbus.machine.host import Host
from vmbus.wire.packet import Packet

from tests.bench.linux import linux_guest
from tests.bench.report import Result

COUNT = 1500
WARM_UP = 50
INTERFACE = uuid.UUID("7a1e9d3c-52f4-4b8e-9c0d-be5c4a11d00b")


class Stamps(Device):
    """Notes when packets come, and how long they and the answers took."""

    name = "stamps"

    def __init__(self) -> None:
        self.host: Host | None = None
        self.reset()

    def reset(self) -> None:
        self.packets = 0
        self.there: list[float] = []
        self.back: list[float] = []
        self._answered = 0

    def offer(self) -> Offer:
        return Offer(INTERFACE, uuid.UUID(int=0x57A3))

    def opened(self, io: ChannelIo) -> None:
        self.reset()

    def packet(self, io: ChannelIo, packet: Packet) -> None:
        assert self.host is not None
        now = self.host.clock.guest_tsc()
        sent, seen = struct.unpack_from("<QQ", packet.payload)
        self.packets += 1
        if self.packets > WARM_UP:
            scale = 1e6 / self.host.clock.tsc_frequency
            self.there.append((now - sent) * scale)
            self.back.append((seen - self._answered) * scale)
        io.answer(packet)
        self._answered = self.host.clock.guest_tsc()


def run() -> Result:
    """See above."""
    return asyncio.run(_run())


async def _run() -> Result:
    result = Result("A packet's way between a guest program and a device (6.12, one vCPU)")
    device = Stamps()
    stamps = f"stamps {INTERFACE} {COUNT}"
    command = [f"{stamps} 300 && echo one && sleep 1 && {stamps} 0"]
    async with linux_guest(command, program="stamps", extra_devices=[device]) as guest:
        device.host = guest.host
        await guest.says("one")
        there, back = device.there, device.back
        status = await guest.finish()
        result.add("to the device, after a pause", there)
        result.add("to the guest, after a pause", back)
        result.add("to the device, one after another", device.there)
        result.add("to the guest, one after another", device.back)
        if status:
            result.notes.append(f"NOT AS PLANNED: {status}\n{guest.tail()}")
    return result
