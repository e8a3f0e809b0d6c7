"""``vmbus demo``: show in less than a minute what the emulator does."""

from __future__ import annotations

import argparse
import asyncio
import datetime
import re
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from vmbus.bus.io.device import Device
from vmbus.cli.devices import registry
from vmbus.cli.options import DEFAULT_GUEST, MAX_VCPUS, whole_number
from vmbus.cli.output import is_terminal, redraw, serving, show, show_json
from vmbus.cli.run import guest_modules, make_image
from vmbus.cli.status import channel_table
from vmbus.errors import UserError
from vmbus.machine import signals
from vmbus.machine.gateway import build as gateway_build
from vmbus.machine.guest import Guest
from vmbus.machine.host import ExitReason
from vmbus.machine.migration import snapshots
from vmbus.machine.qemu.launch import GuestOptions
from vmbus.machine.served import status
from vmbus.printable import one_line
from vmbus.provision.command_output import CommandOutput
from vmbus.provision.initramfs import KERNEL_ARGUMENTS, build_initramfs
from vmbus.provision.kernel import GUESTS, find_kernel
from vmbus.provision.qemu import find_qemu
from vmbus.provision.unpacked import fastest_image

_EPILOG = """\
examples:
  vmbus demo
  vmbus demo --guest debian-backports --smp 2
  vmbus demo --json | jq .heartbeat
"""

_DEVICES = ("heartbeat,interval=0", "shutdown", "timesync")
_WRONG_TIME = "2001-02-03T04:05:06"
"""What the guest's battery clock says at power-on, so that the time can be seen to change."""

_BEATS = 2000
"""Heartbeats to wait for, each time."""

_TIMEOUT = 180.0
"""Seconds that any step may take."""


def add_parser(verbs: Any) -> None:
    parser = verbs.add_parser(
        "demo",
        help="show it all in one run: boot, bus, devices, live migration, snapshot, shutdown",
        description="Boots a guest and shows what its Hyper-V host does for it; takes less than a minute.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--guest",
        choices=sorted(GUESTS),
        default=DEFAULT_GUEST,
        help=f"guest to boot (default: {DEFAULT_GUEST})",
    )
    parser.add_argument(
        "--smp", type=whole_number(1, MAX_VCPUS), default=2, metavar="N", help="vCPUs (default: 2)"
    )
    parser.add_argument("--json", action="store_true", help="print only the results, as one JSON object")
    parser.set_defaults(action=main)


@dataclass
class Screen:
    """The output: finished lines, and on a terminal a part below them that is redrawn."""

    quiet: bool = False
    _live_lines: int = field(default=0, init=False)

    def say(self, text: str) -> None:
        """Print a line that stays."""
        if not self.quiet:
            self._erase()
            show(text)

    def live(self, text: str) -> None:
        """Redraw the part below the finished lines; without a terminal, print nothing."""
        if not self.quiet and is_terminal(sys.stdout):
            self._erase()
            show(text)
            self._live_lines = text.count("\n") + 1

    def _erase(self) -> None:
        if self._live_lines:
            redraw(self._live_lines)
            self._live_lines = 0


def main(arguments: argparse.Namespace) -> int:
    with serving():
        return signals.run(
            _demo(Demo(Screen(quiet=arguments.json), arguments.guest, arguments.smp), arguments.json)
        )


async def _demo(demo: Demo, as_json: bool) -> int:
    result = await demo.run()
    if as_json:
        show_json(result)
    return 0


class Demo:
    """One run of the demo; ``result`` grows step by step."""

    def __init__(self, screen: Screen, guest: str, smp: int) -> None:
        self.screen = screen
        self.guest_name = guest
        self.smp = smp
        self.result: dict[str, Any] = {}
        self.output = bytearray()

    async def run(self) -> dict[str, Any]:
        """Run all steps. Raises :class:`~vmbus.errors.UserError` for a step that fails."""
        with tempfile.TemporaryDirectory(prefix="vmbus-demo-") as folder:
            return await self._run(Path(folder) / "snapshots.qcow2")

    async def _run(self, image: Path) -> dict[str, Any]:
        qemu = find_qemu()
        kernel = find_kernel(self.guest_name)
        self.screen.say(
            f"booting an unmodified Linux {kernel.release} with {self.smp} vCPU{'s' if self.smp > 1 else ''} "
            f"in a stock QEMU {'.'.join(map(str, qemu.version))} (TCG)"
        )
        devices = registry().create_all(_DEVICES)
        options = GuestOptions(
            kernel=fastest_image(kernel),
            initrd=build_initramfs(
                kernel,
                modules=guest_modules(kernel, devices),
                command=["i=0; while :; do i=$((i+1)); echo $i $(date -u +%s); usleep 100000; done"],
            ),
            append=" ".join(KERNEL_ARGUMENTS),
            smp=self.smp,
            command_port=True,
            snapshots=image,
            extra=("-rtc", f"base={_WRONG_TIME}", "-no-reboot"),
        )
        make_image(qemu, image)
        self.started = time.monotonic()
        async with Guest.start(
            name=None,
            qemu=qemu,
            gateway_library=gateway_build.build(),
            memory_size=512 << 20,
            options=options,
            devices=devices,
            new_devices=registry().create_all,
        ) as guest:
            self.guest = guest
            self.serving = asyncio.ensure_future(guest.served.serve())
            reading = asyncio.ensure_future(self._read())
            try:
                await self._boot()
                await self._beat()
                await self._time()
                await self._migrate()
                await self._snapshot()
                await self._shut_down()
            finally:
                reading.cancel()
                self.serving.cancel()
        self.result["seconds"] = round(time.monotonic() - self.started, 2)
        self.screen.say(f"done in {self.result['seconds']:.0f} s; nothing is left behind")
        return self.result

    def _status(self) -> dict[str, Any]:
        return status(self.guest.host, self.guest.directory.name)

    async def _boot(self) -> None:
        await self._until(
            lambda: self.guest.host.partition.guest_os_id,
            "the guest to find Hyper-V",
            self._last_console_line,
        )
        found = cast(dict[str, Any], self.guest.host.partition.status())
        self.screen.say(f"  {self._at()}  the guest found Hyper-V: {found['guest_os']}")
        await self._until(
            lambda: self.guest.host.bus.status()["version"], "VMBus to be connected", self._last_console_line
        )
        version = self.guest.host.bus.status()["version"]
        self.screen.say(f"  {self._at()}  VMBus {version} agreed")
        await self._until(
            lambda: all(channel["state"] == "open" for channel in self._status()["channels"]),
            "every channel to be opened",
            lambda: channel_table(self._status()),
        )
        channels = self._status()["channels"]
        self.screen.say(f"  {self._at()}  {len(channels)} channels open")
        self.result.update(
            guest_os=found["guest_os"], version=version, open_after=round(time.monotonic() - self.started, 2)
        )

    def _heartbeat(self) -> dict[str, Any]:
        """Return the heartbeat device's figures, in whichever QEMU the guest is now."""
        return self._device("heartbeat").status()

    def _device(self, name: str) -> Device:
        return next(a.device for a in self.guest.host.devices if a.device.name == name)

    async def _more_beats(self, count: int) -> None:
        before = self._heartbeat()["answers"]
        await self._until(
            lambda: self._heartbeat()["answers"] >= before + count,
            f"{count} more heartbeats",
            lambda: channel_table(self._status()),
        )

    async def _beat(self) -> None:
        await self._more_beats(_BEATS)
        found = self._status()
        self.screen.say(channel_table(found))
        beat = self._heartbeat()
        trip = beat["round_trip"]
        self.screen.say(
            f"  {self._at()}  {beat['answers']} heartbeats answered, one after another; "
            f"round trip {trip['median_us']:.0f} us (median)"
        )
        self.result["channels"] = [
            {key: channel[key] for key in ("relid", "device", "instance", "state", "target_vp")}
            for channel in found["channels"]
        ]
        self.result["heartbeat"] = beat
        self.result["traps"] = found["traps"]

    async def _time(self) -> None:
        await self._until(lambda: abs(self._clock() - time.time()) < 5, "the guest's clock to be set")
        battery = self._battery_clock()
        error = self._clock() - time.time()
        now = datetime.datetime.fromtimestamp(self._clock(), tz=datetime.UTC)
        self.screen.say(
            f"  {self._at()}  time synchronised: its battery clock said {battery}, the guest now says "
            f"{now:%Y-%m-%d %H:%M:%S} UTC"
        )
        self.result["time"] = {
            "battery_clock": battery,
            "guest": self._clock(),
            "error_seconds": round(error, 2),
        }

    async def _migrate(self) -> None:
        """Migrate live, with a heartbeat outstanding all the time; each answer names the beat that it belongs to."""
        before = self._heartbeat()
        process = self.guest.process.pid
        outcome = await self.guest.move()
        await self._more_beats(_BEATS)
        after = self._heartbeat()
        under_way = after["sequence"] - after["answers"]
        if under_way not in (0, 1) or after["odd_answers"] or self.guest.process.pid == process:
            raise UserError(f"the migration lost something: {before} became {after}")
        self.screen.say(
            f"  {self._at()}  migrated live into a new QEMU: it stood still for {outcome.downtime * 1000:.0f} ms, "
            f"{outcome.report.prepared_in * 1000:.1f} of them for {len(outcome.report.channels)} channels "
            f"({outcome.report.state_bytes} bytes)"
        )
        self.screen.say(
            f"  {self._at()}  heartbeat {before['sequence']} was before, {after['sequence']} is after: "
            "none lost, none twice"
        )
        self.result["migration"] = outcome.as_dict()

    async def _snapshot(self) -> None:
        """Save, continue, restore: what happened after the snapshot is undone, in the guest and in the emulator."""
        await snapshots.save(self.guest.host.migration, "demo")
        saved_beat, saved_count = self._heartbeat()["sequence"], self._count()
        await self._until(
            lambda: self._count() >= saved_count + 10, "the guest to continue after the snapshot"
        )
        lost_beat, lost_count = self._heartbeat()["sequence"], self._count()
        self.output.clear()
        await snapshots.load(self.guest.host.migration, "demo")
        await self._until(lambda: self._count() > 1, "the guest to continue from the snapshot")
        count = self._count()  # at once: on a busy machine it goes far while the heartbeats come
        await self._more_beats(_BEATS)
        if count >= lost_count + 5 or count < saved_count - 1:
            raise UserError(f"the guest counts {count}; the snapshot was made at {saved_count}")
        self.screen.say(
            f"  {self._at()}  snapshot at count {saved_count}, heartbeat {saved_beat}; went on to {lost_count}, "
            f"{lost_beat}; restored: the guest counts on from {saved_count}"
        )
        self.result["snapshot"] = {"saved_at": saved_count, "went_on_to": lost_count, "restored_to": count}

    def _count(self) -> int:
        """Return what the guest's program has counted to; 0 before it started."""
        lines = self.output.split(b"\n")
        return int(lines[-2].split()[0]) if len(lines) > 2 else 0

    async def _shut_down(self) -> None:
        shut_down = self._device("shutdown").control_commands()["shutdown"]
        async with asyncio.timeout(_TIMEOUT):
            result = (await shut_down({"action": "shutdown"}))["result"]
            self.screen.say(
                f"  {self._at()}  shutdown asked for over its channel; the guest answers: {result}"
            )
            exit_reason = await self.serving
        self.result["shutdown"] = {"answer": result, "ending": exit_reason.value}
        if exit_reason is not ExitReason.POWERED_OFF:
            raise UserError(f"the guest did not power off: {exit_reason.value}")
        self.screen.say(f"  {self._at()}  the guest powered off")

    def _at(self) -> str:
        return f"{time.monotonic() - self.started:6.2f} s"

    def _clock(self) -> int:
        """Return the wall clock that the guest's program printed last; 0 before it started."""
        lines = self.output.split(b"\n")
        return int(lines[-2].split()[1]) if len(lines) > 2 else 0

    def _battery_clock(self) -> str:
        found = re.search(r"setting system clock to (\S+)", self._console())
        return found.group(1) if found else "unknown"

    def _console(self) -> str:
        path = self.guest.directory.console
        return path.read_text(errors="replace") if path.exists() else ""

    def _last_console_line(self) -> str:
        lines = self._console().splitlines()
        return f"  {self._at()}  {one_line(lines[-1][:100])}" if lines else f"  {self._at()}  firmware"

    async def _read(self) -> None:
        received = CommandOutput()
        async for data in self.guest.command_output():
            self.output += received.feed(data)

    async def _until(
        self, condition: Callable[[], object], what: str, show: Callable[[], str] | None = None
    ) -> None:
        end = time.monotonic() + _TIMEOUT
        shown = 0.0
        while not condition():
            if self.serving.done() or time.monotonic() > end:
                why = "the guest ended" if self.serving.done() else f"{_TIMEOUT:g} s have passed"
                tail = "\n".join(self._console().splitlines()[-15:])
                raise UserError(f"waited for {what}, but {why}; the end of the guest's console:\n{tail}")
            if show is not None and time.monotonic() - shown > 0.2:
                self.screen.live(show())
                shown = time.monotonic()
            await asyncio.sleep(0.02)
