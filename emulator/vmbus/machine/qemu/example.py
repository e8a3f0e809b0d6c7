"""Makes the files in ``qemu-config/`` from the one list of options: ``python -m vmbus.machine.qemu.example DIR``."""

from __future__ import annotations

import sys
from pathlib import Path

from vmbus.machine.qemu.acpi import vmbus_table
from vmbus.machine.qemu.arguments import EmulatorOptions, libvirt, readconfig

_DIRECTORY = Path("/run/vmbus-example")
_HEADER = """\
# QEMU options that the VMBus host emulator needs. Options that -readconfig does not support must be given on the
# command line below. `vmbus qemu-args --readconfig` prints this file with your own paths. Use with:
#   qemu-system-x86_64 -readconfig vmbus.cfg -smp 1,maxcpus=2 {rest}

"""


def example_options() -> EmulatorOptions:
    """Options with paths that stand for the user's own."""
    return EmulatorOptions(
        memory_path=_DIRECTORY / "memory",
        memory_size=1 << 30,
        gateway_library=Path("/usr/lib/vmbus/vmbus-gateway.so"),
        gateway_socket=_DIRECTORY / "gateway.sock",
        qtest_socket=_DIRECTORY / "qtest.sock",
        qmp_socket=_DIRECTORY / "emulator-qmp.sock",
        acpi_table=_DIRECTORY / "vmbus.aml",
    )


def readconfig_file(options: EmulatorOptions) -> str:
    """The fragment with a header that names the options which have no place in it."""
    text, rest = readconfig(options.options())
    pairs = [f"{rest[i]} {rest[i + 1]}" for i in range(0, len(rest), 2)]
    return _HEADER.format(rest=" \\\n#     ".join(pairs)) + text


def files() -> dict[str, bytes]:
    """Name in ``qemu-config`` → contents."""
    options = example_options()
    return {
        "vmbus.aml": vmbus_table(),
        "vmbus.cfg": readconfig_file(options).encode(),
        "libvirt.xml": libvirt(options.options()).encode(),
    }


def main() -> None:
    target = Path(sys.argv[1] if len(sys.argv) > 1 else "qemu-config")
    for name, contents in files().items():
        (target / name).write_bytes(contents)


if __name__ == "__main__":
    main()
