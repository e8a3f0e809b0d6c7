"""What the gateway and the emulator cost a guest's boot, against the same QEMU without them.

All run the same kernel with the same initramfs, to the first byte that a command prints on its port:

    with        as ``vmbus run`` starts it, three devices offered
    plain       without the emulator's options (gateway, qtest, QMP socket, ACPI table, RAM in a file)
    same RAM    plain, with its RAM in the same kind of file: that alone makes a boot faster

There the modules are loaded too and find no Hyper-V. So a ratio has in it what the gateway costs, and what the
guest does on its VMBus, less what it spares by being told its clock's frequency. The order changes each round.
CPU time is what QEMU and the emulator used; on a loaded machine its ratio says more than that of the times.
"""

from __future__ import annotations

import asyncio
import os
import statistics
import time
from pathlib import Path
from typing import NamedTuple

from vmbus.cli.options import DEFAULT_DEVICES
from vmbus.cli.run import AVAILABLE_MODULES
from vmbus.devices.registry import Registry
from vmbus.machine import rundir
from vmbus.machine.gateway import build as gateway_build
from vmbus.machine.guest import Guest
from vmbus.machine.qemu.launch import GuestOptions, QemuProcess, command_line
from vmbus.provision.command_output import START
from vmbus.provision.initramfs import KERNEL_ARGUMENTS, build_initramfs
from vmbus.provision.kernel import find_kernel
from vmbus.provision.qemu import find_qemu

from tests.bench.linux import KERNEL
from tests.bench.report import Result
from tests.guest.harness import LOADED_MODULES

ROUNDS = 4
MEMORY = 512 << 20
LIMIT = 120.0


class Boot(NamedTuple):
    """One boot."""

    seconds: float
    cpu_seconds: float


def run() -> Result:
    """See above."""
    return asyncio.run(_run())


async def _run() -> Result:
    result = Result("Boot: QEMU's start to a command's first output (6.12, one vCPU)")
    kernel = find_kernel(KERNEL)
    initrd = build_initramfs(
        kernel, modules=LOADED_MODULES, available=AVAILABLE_MODULES, command=["echo", "up"]
    )
    options = GuestOptions(
        kernel=kernel.vmlinuz, initrd=initrd, append=" ".join(KERNEL_ARGUMENTS), command_port=True
    )
    measure = {
        "with": lambda: _with_emulator(options),
        "plain": lambda: _without(options, file=False),
        "same RAM": lambda: _without(options, file=True),
    }
    boots: dict[str, list[Boot]] = {which: [] for which in measure}
    for turn in range(ROUNDS):
        for which in sorted(measure, reverse=bool(turn % 2)):
            boots[which].append(await measure[which]())
    for which, taken in boots.items():
        result.figure(f"{which}, median", statistics.median(boot.seconds for boot in taken), "s")
    for which in ("plain", "same RAM"):
        pairs = list(zip(boots["with"], boots[which], strict=True))
        ratios = [a.seconds / b.seconds for a, b in pairs]
        cpu = statistics.median(a.cpu_seconds / b.cpu_seconds for a, b in pairs)
        result.figure(f"with / {which}, median of {ROUNDS}", statistics.median(ratios), "", "<= 1.10")
        result.figure(f"with / {which}, least", min(ratios))
        result.figure(f"with / {which}, greatest", max(ratios))
        result.figure(f"with / {which}, CPU time, median", cpu)
    return result


async def _with_emulator(options: GuestOptions) -> Boot:
    begun, own = (
        time.monotonic(),
        time.process_time(),
    )  # the few milliseconds before QEMU are the emulator's, too
    async with Guest.start(
        name=None,
        qemu=find_qemu(),
        gateway_library=gateway_build.build(),
        memory_size=MEMORY,
        options=options,
        devices=[Registry().create(line) for line in DEFAULT_DEVICES],
    ) as guest:
        assert guest.command is not None
        await _first_output(guest.command[0])
        own = time.process_time() - own
        return Boot(time.monotonic() - begun, own + _cpu_seconds(guest.process.pid))


async def _without(options: GuestOptions, *, file: bool) -> Boot:
    directory = rundir.create(None)
    process: QemuProcess | None = None
    try:
        await directory.make_memory(MEMORY)
        qemu = find_qemu()
        size = f"{MEMORY >> 20}M"
        plain = ["-accel", "tcg", "-m", f"size={size}"]
        if file:
            backend = f"memory-backend-file,id=ram,mem-path={directory.memory},share=on,size={size}"
            plain += ["-object", backend, "-machine", "memory-backend=ram"]
        line = [*command_line(qemu.argv_prefix, directory, None, options), *plain]
        begun = time.monotonic()
        process = QemuProcess.start(line, directory.qemu_log, qemu.environment)
        reader, writer = await _connect(str(directory.command))
        await _first_output(reader)
        writer.close()
        return Boot(time.monotonic() - begun, _cpu_seconds(process.pid))
    finally:
        if process is not None:
            await asyncio.to_thread(process.stop)
        directory.remove()


def _cpu_seconds(pid: int) -> float:
    """What a process has used so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


async def _connect(path: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    end = time.monotonic() + LIMIT
    while True:
        try:
            return await asyncio.open_unix_connection(path)
        except (FileNotFoundError, ConnectionRefusedError):
            if time.monotonic() > end:
                raise
            await asyncio.sleep(0.005)


async def _first_output(reader: asyncio.StreamReader) -> None:
    async with asyncio.timeout(LIMIT):
        await reader.readuntil(START)
        await reader.readexactly(1)
