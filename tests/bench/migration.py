"""What the emulator adds to a live migration, against the same guest in the same QEMU alone.

Three guests run side by side and are migrated in turn, each into a new QEMU: the same kernel, initramfs and memory.
One has the emulator and 16 open channels; one is in QEMU alone; one is in a QEMU that pauses before the switch-over
and has a helper on its D-Bus that keeps as many bytes as the emulator, and does nothing: what it adds is the least
that anything can that is saved with a guest in this way. Once they are idle, and once all write memory all the time
while the one with the emulator also answers heartbeats, one after another. Downtimes are QEMU's own account.

Then a guest that reads a disk, with and without early marks (``reading``); and without any guest what saving costs
(``saving``), and what the log of written pages costs on the way of a packet.
"""

from __future__ import annotations

import ast
import asyncio
import contextlib
import inspect
import statistics
import textwrap
import time
import uuid
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import replace
from typing import Any

from vmbus.bus.io.device import Device
from vmbus.cli.run import AVAILABLE_MODULES
from vmbus.devices.registry import Registry
from vmbus.errors import UserError
from vmbus.machine import memory, rundir
from vmbus.machine.gateway import build as gateway_build
from vmbus.machine.guest import Guest
from vmbus.machine.memory import MappedMemory, MappedPages
from vmbus.machine.migration.vmstate import HELPER_ID, DbusDaemon, VmStateHelper
from vmbus.machine.qemu.launch import GuestOptions, QemuProcess, command_line
from vmbus.machine.qemu.qmp import Qmp
from vmbus.machine.qemu.qtest import MainLoopWaits
from vmbus.machine.rundir import RunDirectory
from vmbus.provision.initramfs import KERNEL_ARGUMENTS, build_initramfs
from vmbus.provision.kernel import find_kernel
from vmbus.provision.qemu import find_qemu
from vmbus_devices.heartbeat import Heartbeat

from tests.bench.fresh_moves import add_fresh
from tests.bench.linux import KERNEL
from tests.bench.reading import add_reading
from tests.bench.report import Result
from tests.bench.ring import SHAPES, bench_channel
from tests.bench.saving import add_saving
from tests.guest.harness import LOADED_MODULES

ROUNDS = 9
MEMORY = 256 << 20
LIMIT = 120.0
CHANNELS = 16
WRITING = (
    "dd if=/dev/urandom of=/from bs=1M count=4 2>/dev/null; while :; do cp /from /to; usleep 20000; done"
)
LOADS = {"idle": ("sleep 100000", 1000.0), "under load": (WRITING, 0.0)}
"""What the guest runs, and the pause between its heartbeats in seconds."""
AIMS = {"idle": "< 2 ms", "under load": "< 10 ms"}
DOWNTIME_LIMIT = {"idle": 5, "under load": 300}
"""In milliseconds, for QEMU: idle guests are sent until little is left for the pause, as what is left varies."""

WRITERS = ((MappedPages, "store_u32"), (MappedMemory, "_stored"))
SHAPES_OF_LOG = ("in band, 64 bytes", "storage read, 4 KiB")
LOG_PACKETS = 20_000
LOG_ROUNDS = 20


class OneOfMany(Heartbeat):
    """A heartbeat channel beside others."""

    def __init__(self, interval: float, number: int) -> None:
        super().__init__(interval=interval)
        self.instance_id = uuid.UUID(int=Heartbeat.instance_id.int + number)  # type: ignore[misc]


def run() -> Result:
    """See above."""
    result = Result(f"Migration: {MEMORY >> 20} MiB, one vCPU, 6.12, {CHANNELS} open channels; in turn")
    for name, (command, interval) in LOADS.items():
        asyncio.run(_compare(result, name, command, interval))
    add_fresh(result)
    add_reading(result)
    add_saving(result)
    add_log(result)
    return result


def guest_options(command: str) -> GuestOptions:
    """A guest that says ``up``, and then runs ``command``."""
    kernel = find_kernel(KERNEL)
    return GuestOptions(
        kernel=kernel.vmlinuz,
        initrd=build_initramfs(
            kernel,
            modules=LOADED_MODULES,
            available=AVAILABLE_MODULES,
            command=["sh", "-c", f"echo up; {command}"],
        ),
        append=" ".join(KERNEL_ARGUMENTS),
        command_port=True,
    )


async def _compare(result: Result, name: str, command: str, interval: float) -> None:
    options = guest_options(command)
    limit: dict[str, object] = {"downtime-limit": DOWNTIME_LIMIT[name]}
    own, alone, helped, prepared, size = [], [], [], [], 0
    async with (
        with_emulator(options, interval) as guest,
        _alone(options) as bare,
        _alone(options, helper=True) as side_channel,
    ):

        async def move_own() -> None:
            nonlocal size
            await guest.host.qmp.execute("migrate-set-parameters", limit)
            outcome = await guest.move(timeout=LIMIT)
            own.append(outcome.downtime * 1e3)
            prepared.append(outcome.report.prepared_in * 1e3)
            size = outcome.report.state_bytes

        async def move_alone() -> None:
            alone.append(await bare.move(limit) * 1e3)

        async def move_beside() -> None:
            side_channel.state = bytes(size)
            helped.append(await side_channel.move(limit) * 1e3)

        turns = [move_own, move_alone, move_beside]
        for turn in range(ROUNDS):
            for move in turns[turn % 3 :] + turns[: turn % 3]:
                await move()
    medians = [statistics.median(each) for each in (own, helped, alone)]
    for what, median in zip(
        ("with the emulator", "with a helper that does nothing", "in QEMU alone"), medians, strict=True
    ):
        result.figure(f"{name}: downtime {what}, median", median, "ms")
    for what, others, aim in (
        ("added", alone, AIMS[name]),
        ("added to that of a helper that does nothing", helped, ""),
    ):
        added = [a - b for a, b in zip(own, others, strict=True)]
        result.figure(f"{name}: {what}, median of {ROUNDS}", statistics.median(added), "ms", aim)
    result.figure(f"{name}: ratio of medians", medians[0] / medians[2])
    result.figure(f"{name}: of that before migrate-continue, median", statistics.median(prepared), "ms")
    result.figure(f"{name}: state", size, "bytes")


# --- with the emulator ---


@contextlib.asynccontextmanager
async def with_emulator(options: GuestOptions, interval: float) -> AsyncIterator[Guest]:
    """A guest with 16 open channels, one of which has heartbeats every ``interval`` seconds."""

    def devices(_: Sequence[str] = ()) -> Sequence[Device]:
        plain = [Registry().create(line) for line in ("shutdown", "timesync")]
        first: list[Device] = [OneOfMany(interval, 0)]
        return plain + first + [OneOfMany(1000.0, n) for n in range(1, CHANNELS - len(plain))]

    async with Guest.start(
        name=None,
        qemu=find_qemu(),
        gateway_library=gateway_build.build(),
        memory_size=MEMORY,
        options=options,
        devices=devices(),
        new_devices=devices,
    ) as guest:
        serving = asyncio.ensure_future(guest.served.serve())
        end = time.monotonic() + LIMIT
        while sum(each.io.state.value == "running" for each in guest.host.devices) < CHANNELS:
            if time.monotonic() > end:
                raise UserError(f"not {CHANNELS} channels open within {LIMIT:g} s")
            await asyncio.sleep(0.05)
        yield guest
        guest.host.stop()
        await serving


# --- QEMU alone ---


class Bare:
    """A guest in a QEMU without an emulator. ``helper``: a D-Bus peer has ``state`` saved and loaded."""

    def __init__(self, options: GuestOptions, *, helper: bool = False) -> None:
        self._options = options
        self._helper = helper
        self._stack = contextlib.AsyncExitStack()
        self._qmp: Qmp | None = None
        self._directory: RunDirectory | None = None
        self.state = b""

    async def save(self) -> bytes:
        return self.state

    def load(self, state: bytes) -> None:
        self.state = state

    @property
    def save_refusal(self) -> bytes:
        return self.state

    def save_was_refused(self) -> None: ...

    async def start(self, *, incoming: bool) -> contextlib.AsyncExitStack:
        """A QEMU; it is this guest's from now on."""
        stack = contextlib.AsyncExitStack()
        qemu, directory = find_qemu(), rundir.create(None)
        stack.callback(directory.remove)
        await directory.make_memory(MEMORY)
        size = f"{MEMORY >> 20}M"
        backend = f"memory-backend-file,id=ram,mem-path={directory.memory},share=on,size={size}"
        plain = ["-accel", "tcg", "-m", f"size={size}", "-object", backend, "-machine", "memory-backend=ram"]
        if self._helper:
            daemon = await DbusDaemon.start(qemu.dbus_daemon(), directory.path)
            stack.callback(daemon.stop)
            helper = await VmStateHelper.connect(daemon.address, self, MainLoopWaits())
            stack.push_async_callback(helper.close)
            plain += ["-object", f"dbus-vmstate,id=state,addr={daemon.address},id-list={HELPER_ID}"]
        options = replace(self._options, incoming=incoming)
        line = [*command_line(qemu.argv_prefix, directory, None, options), *plain]
        process = QemuProcess.start(line, directory.qemu_log, qemu.environment)
        stack.push_async_callback(asyncio.to_thread, process.stop)
        self._qmp = await process.connect_qmp(directory.user_qmp)
        stack.push_async_callback(self._qmp.close)
        self._directory = directory
        return stack

    async def boot(self) -> None:
        """Until its command runs."""
        self._stack = await self.start(incoming=False)
        assert self._directory is not None
        reader, writer = await asyncio.open_unix_connection(str(self._directory.command))
        async with asyncio.timeout(LIMIT):
            await reader.readuntil(b"up")
        writer.close()

    async def move(self, parameters: dict[str, object]) -> float:
        """Into a new QEMU; its downtime in seconds."""
        before, source = self._stack, self._qmp
        there = await self.start(incoming=True)
        assert source is not None and self._qmp is not None and self._directory is not None
        uri = f"unix:{self._directory.path}/migration.sock"
        await self._qmp.execute("migrate-incoming", {"uri": uri})
        names = ["return-path", "events", *(["pause-before-switchover"] if self._helper else [])]
        wanted = [{"capability": name, "state": True} for name in names]
        await source.execute("migrate-set-capabilities", {"capabilities": wanted})
        await source.execute("migrate-set-parameters", parameters)
        async with asyncio.timeout(LIMIT), contextlib.aclosing(source.events()) as events:
            await source.execute("migrate", {"uri": uri})
            async for event, data in events:
                if event == "MIGRATION" and data["status"] == "pre-switchover":
                    await source.execute("migrate-continue", {"state": "pre-switchover"})
                if event == "MIGRATION" and data["status"] == "completed":
                    break
        found: dict[str, Any] = await source.execute("query-migrate")
        await before.aclose()
        self._stack = there
        return float(found["downtime"]) / 1000

    async def close(self) -> None:
        await self._stack.aclose()


@contextlib.asynccontextmanager
async def _alone(options: GuestOptions, *, helper: bool = False) -> AsyncIterator[Bare]:
    bare = Bare(options, helper=helper)
    try:
        await bare.boot()
        yield bare
    finally:
        await bare.close()


# --- the log of written pages ---


class _NoLog(ast.NodeTransformer):
    """Takes out every store into ``dirty``."""

    def visit_Assign(self, node: ast.Assign) -> ast.AST:
        into = [each.value for each in node.targets if isinstance(each, ast.Subscript)]
        names = {each.attr if isinstance(each, ast.Attribute) else getattr(each, "id", "") for each in into}
        return ast.copy_location(ast.Pass(), node) if "dirty" in names else node


@contextlib.contextmanager
def _without_log() -> Iterator[None]:
    """The methods that write guest memory, as they are less the log."""
    plain = {(owner, name): getattr(owner, name) for owner, name in WRITERS}
    for owner, name in WRITERS:
        tree = _NoLog().visit(ast.parse(textwrap.dedent(inspect.getsource(plain[owner, name]))))
        found: dict[str, Any] = {}
        exec(compile(ast.fix_missing_locations(tree), "<without log>", "exec"), vars(memory), found)
        setattr(owner, name, found[name])
    try:
        yield
    finally:
        for (owner, name), method in plain.items():
            setattr(owner, name, method)


def add_log(result: Result) -> None:
    """What remembering written pages costs where every packet passes: the channel benchmark of ``ring``, in turn."""
    for shape in SHAPES_OF_LOG:
        seconds: dict[bool, list[float]] = {True: [], False: []}
        for turn in range(LOG_ROUNDS):
            for logged in (turn % 2 == 0, turn % 2 == 1):
                with contextlib.nullcontext() if logged else _without_log():
                    seconds[logged].append(bench_channel(SHAPES[shape], 32, LOG_PACKETS))
        name = f"log of written pages, {shape}: with / without"
        ratio = min(seconds[True]) / min(seconds[False])  # others on the machine only ever add
        result.figure(f"{name}, least of {LOG_ROUNDS}", ratio, "", "< 1.02")
