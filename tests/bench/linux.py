"""Real guests for benchmarks, and programs compiled for them."""

from __future__ import annotations

import contextlib
import subprocess
import tempfile
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

from vmbus.bus.io.device import Device

from tests.guest.harness import DEFAULT_DEVICES, LOADED_MODULES, Booted, boot

KERNEL = "debian-6.12"
_PROGRAMS = Path(__file__).parent / "programs"
_GUEST_PROGRAMS = Path(__file__).parent.parent / "guest" / "programs"


@contextlib.asynccontextmanager
async def linux_guest(
    command: Sequence[str],
    *,
    devices: Sequence[str] = DEFAULT_DEVICES,
    extra_devices: Sequence[Device] = (),
    program: str = "",
) -> AsyncIterator[Booted]:
    """A guest that runs ``command``; ``program``: a C file of ours that is compiled and put into its ``/bin``."""
    with tempfile.TemporaryDirectory(prefix="vmbus-bench-") as folder:
        add = [(compile_program(program, Path(folder)), f"/bin/{program}")] if program else []
        load = (*LOADED_MODULES, "uio_hv_generic") if program else LOADED_MODULES
        async with boot(
            Path(folder), kernel=KERNEL, command=command, devices=devices, add=add, load=load
        ) as guest:
            for device in extra_devices:
                guest.host.add_device(device)
            yield guest


def compile_program(name: str, folder: Path) -> Path:
    source = next(path for path in (_PROGRAMS / f"{name}.c", _GUEST_PROGRAMS / f"{name}.c") if path.exists())
    target = folder / name
    flags = ["-static", "-O2", "-Wall", "-Wextra", "-Wno-unused-function", "-I", str(_GUEST_PROGRAMS)]
    subprocess.run(["cc", *flags, "-o", target, source], check=True)
    return target
