"""Random messages for a bus.

    python -m tests.fuzz.bus_messages --count 1000000 --seed 1

Most messages are well-formed with small numbers, so that they pass the first checks; some are truncated, lengthened
or damaged; some are random bytes. Devices are added and removed, close slowly and fail; the guest takes its messages
late or never. Checked: nothing raises, all state that a guest can cause in the host is bounded, and a machine reset
leaves none of it. Reports the rate and the growth of the process.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import random
import resource
import sys
import time
from collections import Counter
from collections.abc import Callable

from vmbus.bus.channel.channel import Channel
from vmbus.bus.channel.gpadl import MAX_ASSEMBLIES, MAX_CONNECTION_GPADLS, MAX_CONNECTION_PAGES
from vmbus.bus.channel.state import ChannelState
from vmbus.bus.messages import MAX_UNDELIVERED, PostResult
from vmbus.errors import DeviceError, GuestError, VmbusError
from vmbus.testing.scripted import ForgetfulEndpoint, ScriptedGuest, an_offer
from vmbus.wire.gpadl import GpaRange, build_ranges
from vmbus.wire.header import MAX_MESSAGE, MessageType
from vmbus.wire.offer import OfferFlags
from vmbus.wire.version import ALL_FEATURES, Version

CHECK_EVERY = 5_000
DEVICES = 6

GUEST_MESSAGES = [3, 5, 7, 8, 9, 11, 13, 14, 16, 18, 19, 21, 22, 25, 27, 29]
WEIGHTS = [0.5, 20, 8, 25, 12, 8, 4, 0.3, 0.1, 3, 4, 1, 4, 1, 0.3, 1]


class ForgetfulFuzzEndpoint(ForgetfulEndpoint):
    """An endpoint that fails and defers at random, and cannot be restored."""

    def __init__(self, rng: random.Random) -> None:
        super().__init__()
        self.rng = rng
        self.opens = 0

    def _note(self, call: str) -> None:
        draw = self.rng.random()
        self.opens += call == "opened"
        self.defer_close = draw < 0.2
        self.defer_open = 0.1 < draw < 0.25
        self.defer_teardown = 0.2 < draw < 0.3
        if draw > 0.97:
            raise self.rng.choice([RuntimeError("bug"), DeviceError("device"), GuestError("guest")])


class FuzzEndpoint(ForgetfulFuzzEndpoint):
    """An endpoint that fails and defers at random, and can be restored."""

    def restored(self, channel: Channel) -> None:
        self._note("restored")
        channel.ring_pages()


class Fuzzer:
    """A bus that receives random messages."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.guest = ScriptedGuest.on_fakes(vp_count=4, memory_size=1 << 20, supported_flags=ALL_FEATURES)
        self.bus = self.guest.bus
        self.results: Counter[PostResult] = Counter()
        self.answers = 0
        self.moves = 0
        self.peak = Counter[str]()

    # --- messages ---

    def small(self) -> bytes:
        """Return a 32-bit number that is likely to be the id of something."""
        rng = self.rng
        draw = rng.random()
        number = (
            rng.randrange(1, 9)
            if draw < 0.9
            else rng.choice((0, 0xFFFFFFFF, 0x7FF, 0x800, rng.getrandbits(32)))
        )
        return number.to_bytes(4, "little")

    def names(self) -> tuple[bytes, bytes]:
        """Return the ids of a channel and of one of its GPADLs, which mostly exist."""
        rng = self.rng
        channels = self.bus.channels
        if not channels or rng.random() < 0.2:
            return self.small(), self.small()
        channel = rng.choice(channels)
        relid = (channel.relid or 0).to_bytes(4, "little")
        if not channel.gpadls or rng.random() < 0.2:
            return relid, self.small()
        return relid, rng.choice(list(channel.gpadls)).to_bytes(4, "little")

    def message(self) -> bytes:
        """Return one message, valid or not."""
        rng = self.rng
        draw = rng.random()
        if draw < 0.02:
            return rng.randbytes(rng.randrange(0, 300))
        number = rng.choices(GUEST_MESSAGES, WEIGHTS)[0]
        if draw < 0.04:
            number = rng.randrange(0, 40)
        payload = number.to_bytes(4, "little") + bytes(4) + self.body(number)
        if draw < 0.10:
            payload = payload[: rng.randrange(0, len(payload) + 1)]
        elif draw < 0.14:
            payload = payload.ljust(MAX_MESSAGE, b"\xa5")
        elif draw < 0.17:
            damaged = bytearray(payload)
            damaged[rng.randrange(len(damaged))] ^= 1 << rng.randrange(8)
            payload = bytes(damaged)
        return payload

    def body(self, number: int) -> bytes:
        rng, small = self.rng, self.small
        match number:
            case MessageType.INITIATE_CONTACT:
                return self.contact()
            case MessageType.OPENCHANNEL:
                target = rng.choice((bytes(4), b"\x01\0\0\0", b"\xff" * 4, small()))
                signals = rng.choice((0x2001, 0x2002, 0x5555, 0)).to_bytes(4, "little") + small()
                relid, ring = self.names()
                return relid + small() + ring + target + b"\x02\0\0\0" + bytes(120) + signals
            case MessageType.GPADL_HEADER:
                pages = rng.choice((2, 4, 4, 8, 26, 27, 60, 250, 8190))
                base = rng.choice((0, 100, 1 << 40))
                data = build_ranges(
                    [GpaRange(pages * 4096, rng.choice((0, 0, 0, 8, 4096)), range(base, base + pages))]
                )
                length = (len(data) & 0xFFFF).to_bytes(2, "little")
                return (
                    small() + small() + length + rng.choice((b"\1\0", b"\1\0", b"\2\0", b"\0\0")) + data[:220]
                )
            case MessageType.GPADL_BODY:
                ids = list(self.bus.gpadl_assembler.assemblies) or [1]
                return bytes(4) + rng.choice(ids).to_bytes(4, "little") + bytes(8 * rng.randrange(0, 29))
            case MessageType.TL_CONNECT_REQUEST | MessageType.MODIFY_CONNECTION:
                return rng.choice(
                    (bytes(48), rng.randbytes(48), b"\0\x50" + bytes(6) + b"\0\x60" + bytes(38))
                )
            case MessageType.OPEN_RESERVED_CHANNEL:
                relid, ring = self.names()
                return relid + rng.choice((bytes(4), small())) + small() + ring + b"\x02\0\0\0"
            case MessageType.CLOSE_RESERVED_CHANNEL:
                return self.names()[0] + rng.choice((bytes(4), small())) + small()
            case MessageType.MODIFYCHANNEL:
                return self.names()[0] + rng.choice((b"\1\0\0\0", small()))
        return b"".join(self.names())

    def contact(self) -> bytes:
        rng = self.rng
        version: int = rng.choice([*Version, Version.COPPER, Version.IRON, rng.getrandbits(32)])
        target: int = rng.choice((0, 0, 0, 1, 3, 4, rng.getrandbits(32)))
        info = b"\x02\0\0\0" + rng.choice((bytes(4), b"\xff\0\0\0", rng.randbytes(4)))
        if version < Version.WIN10_RS3_1 or rng.random() < 0.1:
            info = rng.choice((bytes(8), b"\0\x70" + bytes(6), rng.randbytes(8)))
        pages = rng.choice((bytes(16), b"\0\x50" + bytes(6) + b"\0\x60" + bytes(6), rng.randbytes(16)))
        return version.to_bytes(4, "little") + target.to_bytes(4, "little") + info + pages + bytes(16)

    # --- other events ---

    def devices(self) -> None:
        """Make something happen at the host's side."""
        rng, bus = self.rng, self.bus
        channels = bus.channels
        acts: list[Callable[[], object]] = [
            self.offer,
            self.offer,
            bus.pause,
            bus.resume,
            bus.resume,
            self.reconnect,
        ]
        if channels:
            channel = rng.choice(channels)
            acts += [lambda: bus.revoke(channel)] if rng.random() < 0.3 else []
            acts += [channel.pause, channel.resume, channel.resume]
            acts += [channel.signal_guest]
            acts += [channel.finish_open, channel.finish_close] * 4
            if channel.gpadls:
                gpadl = rng.choice(list(channel.gpadls.values()))
                acts += [lambda: channel.finish_teardown(gpadl)] * 2
        if rng.random() < 0.01:
            acts = [bus.reset, self.reconnect, self.move]
        elif rng.random() < 0.02:
            acts = [self.move]
        act = rng.choice(acts)
        if act == self.move:
            self.move()
            bus = self.bus
        else:
            with contextlib.suppress(VmbusError):  # the devices of this fuzzer violate their contract, too
                act()
        if rng.random() < 0.4:
            bus.resume()
        if rng.random() < 0.3:
            self.guest.timers.advance(0.2)
        ports = list(self.guest.synic.ports.values())
        rng.choice(ports)()

    def move(self) -> None:
        """Save the bus and continue with another one: every saved state can be restored."""
        state = self.guest.save()
        old = [channel for channel in self.bus.channels if not channel.revoking]
        refusals = self.bus.refusals.counts
        self.bus = self.guest.bus = self.guest.another_bus(supported_flags=ALL_FEATURES)
        self.bus.refusals.counts = refusals
        self.bus.restore(state)
        for channel in old:
            if self.rng.random() < 0.8:
                endpoint = FuzzEndpoint if self.rng.random() < 0.8 else ForgetfulFuzzEndpoint
                with contextlib.suppress(VmbusError):  # a sub-channel without its primary channel
                    self.bus.offer(channel.offer, endpoint(self.rng))
        self.bus.resume()
        self.moves += 1

    def let_go(self) -> None:
        """Let every device finish what it deferred."""
        for channel in self.bus.channels:
            channel.resume()
            for act in (channel.finish_open, channel.finish_close):
                with contextlib.suppress(VmbusError):
                    act()
            for gpadl in list(channel.gpadls.values()):
                with contextlib.suppress(VmbusError):
                    channel.finish_teardown(gpadl)

    def offer(self) -> None:
        rng = self.rng
        number = rng.randrange(1, DEVICES)
        more = {"subchannel_index": rng.randrange(1, 3)} if rng.random() < 0.3 else {}
        flags = rng.choice((0x1, 0x401, 0x400F))
        self.bus.offer(
            an_offer(f"fuzz{number}", instance=number, flags=OfferFlags(flags), **more), FuzzEndpoint(rng)
        )

    def reconnect(self) -> None:
        """Make a valid connection for the messages that follow."""
        for _ in range(3):
            with contextlib.suppress(VmbusError):
                self.offer()
        version = self.rng.choice((Version.COPPER, Version.IRON, Version.WIN10, Version.WIN8, Version.V1))
        target = b"\x02" + bytes(3) + self.rng.choice((bytes(4), b"\x35\0\0\0"))
        if version < Version.WIN10_RS3_1:
            target = b"\0\x70" + bytes(6)
        pages = self.rng.choice((bytes(16), b"\0\x50" + bytes(6) + b"\0\x60" + bytes(6)))
        self.post(b"\x0e" + bytes(7) + version.to_bytes(4, "little") + bytes(4) + target + pages)
        self.post(b"\x03" + bytes(7))

    def post(self, payload: bytes) -> None:
        trusted = self.rng.random() < 0.7 if self.bus.connection.trusted else False
        self.results[self.bus.handle_message(0, self.rng.choice((1, 4)), payload, trusted=trusted)] += 1

    def drain(self) -> None:
        self.answers += len(self.guest.synic.messages)
        self.guest.synic.messages.clear()
        self.guest.synic.events.clear()

    # --- checks ---

    def check(self) -> None:
        """Check that all state that a guest can cause in the host is bounded and consistent."""
        bus = self.bus
        held = [gpadl for channel in bus.channels for gpadl in channel.gpadls.values()]
        quota, assemblies = bus.gpadl_assembler.quota, bus.gpadl_assembler.assemblies
        weights = [gpadl.weight for gpadl in held] + [each.weight for each in assemblies.values()]
        if (quota.gpadls, quota.pages) != (len(weights), sum(weights)):
            raise AssertionError(
                f"{quota.gpadls} GPADLs, {quota.pages} pages, not {len(weights)}, {sum(weights)}"
            )
        bounds = {
            "pages": (quota.pages, MAX_CONNECTION_PAGES),
            "gpadls": (quota.gpadls, MAX_CONNECTION_GPADLS),
            "assemblies": (len(assemblies), MAX_ASSEMBLIES),
            "channels": (len(bus.channels), 100),
            "ports": (len(self.guest.synic.ports), 2 + 2 * len(bus.channels)),
            "held": (len(bus.outbox.waiting), 4 * MAX_UNDELIVERED),
            "reasons": (len(bus.refusals.counts), 100),
        }
        for name, (value, bound) in bounds.items():
            self.peak[name] = max(self.peak[name], value)
            if value > bound:
                raise AssertionError(f"{value} {name}, more than {bound}")
        bus.status()

    def finish(self) -> None:
        """Check that nothing is left after a reset, when all devices have finished."""
        bus = self.bus
        bus.resume()
        bus.reset()
        for _ in range(100):
            self.let_go()
        busy = [channel for channel in bus.channels if channel.state is not ChannelState.RELEASED]
        ports = set(self.guest.synic.ports)
        quota, assemblies = bus.gpadl_assembler.quota, bus.gpadl_assembler.assemblies
        if busy or quota.gpadls or quota.pages or assemblies or ports != {2, 3}:
            raise AssertionError(f"left over: {busy}, {vars(quota)}, {assemblies}, ports {ports}")

    def run(self, count: int) -> None:
        """Send ``count`` messages."""
        rng = self.rng
        for number in range(1, count + 1):
            self.post(self.message())
            draw = rng.random()
            if draw < 0.05:
                self.devices()
            elif draw < 0.15 and self.bus.version is None:
                self.let_go()
                self.reconnect()
            if draw > 0.9 and rng.random() < 0.9:
                self.drain()
            if number % CHECK_EVERY == 0:
                self.check()
        self.finish()


ALLOWED_GROWTH = 8 << 10
"""KiB by which the peak of memory may grow after the warm-up: state that a guest can cause is bounded."""


def main() -> int:
    """Run from the command line; return exit status 1 if memory grew."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=100_000, help="messages to throw")
    parser.add_argument("--seed", type=int, default=0, help="the same seed throws the same messages")
    options = parser.parse_args()
    logging.disable(logging.CRITICAL)
    fuzzer = Fuzzer(options.seed)
    warm_up = min(options.count // 10, 50_000)
    begin = time.perf_counter()
    fuzzer.run(warm_up)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    fuzzer.run(options.count - warm_up)
    took = time.perf_counter() - begin
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(f"{options.count} messages in {took:.1f} s: {options.count / took:.0f} a second")
    print(f"{fuzzer.answers} answers, {fuzzer.results[PostResult.RETRY]} posts put off, {fuzzer.moves} moves")
    print(f"peak memory {after / 1024:.0f} MiB, grown by {(after - before) / 1024:.1f} MiB after the warm-up")
    print("most at a time: " + ", ".join(f"{value} {name}" for name, value in sorted(fuzzer.peak.items())))
    print(
        "refusals: "
        + ", ".join(f"{name} {value}" for name, value in sorted(fuzzer.bus.refusals.counts.items()))
    )
    if after - before > ALLOWED_GROWTH:
        print("memory grew", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
