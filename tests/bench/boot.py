"""What the gateway and the emulator cost a guest's boot, against the same QEMU without them.

Both run the same kernel with the same initramfs to the first byte that a command prints on its port. ``without``
lacks the emulator's options (the gateway, qtest, the ACPI table, RAM in a shared file) and nothing else: there
the modules are loaded too and find no Hyper-V. So the ratio has in it what the gateway costs, and what the guest
does on its VMBus, less what it spares by knowing its clock's frequency. The order changes from pair to pair.
"""

from __future__ import annotations

import asyncio
import statistics
import time

from device.registry import Registry
from emulator.cli.options import DEFAULT_DEVICES
from emulator.cli.run import AVAILABLE_MODULES
from emulator.machine import gateway_build, rundir
from emulator.machine.guest import Guest
from emulator.machine.launch import GuestOptions, QemuProcess, command_line
from emulator.provision.command_output import START
from emulator.provision.initramfs import KERNEL_ARGUMENTS, build_initramfs
from emulator.provision.kernel import find_kernel
from emulator.provision.qemu import find_qemu
from tests.bench.linux import KERNEL
from tests.bench.report import Result
from tests.guest.harness import LOADED_MODULES

PAIRS = 4
MEMORY = 512 << 20
LIMIT = 120.0


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
    times: dict[str, list[float]] = {"with": [], "without": []}
    measure = {"with": _with_emulator, "without": _without}
    for pair in range(PAIRS):
        for which in ("with", "without") if pair % 2 else ("without", "with"):
            times[which].append(await measure[which](options))
    ratios = [a / b for a, b in zip(times["with"], times["without"], strict=True)]
    for which, taken in times.items():
        result.figure(f"{which} emulator, median", statistics.median(taken), "s")
    result.figure("ratio, median of pairs", statistics.median(ratios), "", "<= 1.10")
    result.notes.append(
        "pairs (with / without, seconds): "
        + ", ".join(
            f"{a:.2f}/{b:.2f}={a / b:.3f}" for a, b in zip(times["with"], times["without"], strict=True)
        )
    )
    result.figure("ratio, least", min(ratios))
    result.figure("ratio, greatest", max(ratios))
    return result


async def _with_emulator(options: GuestOptions) -> float:
    begun = time.monotonic()  # the few milliseconds before QEMU are the emulator's, too
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
        return time.monotonic() - begun


async def _without(options: GuestOptions) -> float:
    directory = rundir.create(None, MEMORY)
    process: QemuProcess | None = None
    try:
        qemu = find_qemu()
        plain = ["-accel", "tcg", "-m", f"size={MEMORY >> 20}M"]
        line = [*command_line(qemu.argv_prefix, directory, None, options), *plain]
        begun = time.monotonic()
        process = QemuProcess.start(line, directory.qemu_log, qemu.environment)
        reader, writer = await _connect(str(directory.command))
        await _first_output(reader)
        writer.close()
        return time.monotonic() - begun
    finally:
        if process is not None:
            await asyncio.to_thread(process.stop)
        directory.remove()


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
