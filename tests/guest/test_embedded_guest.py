"""The embedded guest by itself, without an emulator: it boots, runs a command, reports, and powers off."""

from __future__ import annotations

import contextlib
import os
import select
import socket
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from vmbus.errors import MissingRequirement
from vmbus.provision.command_output import CommandOutput
from vmbus.provision.drivers import guest_info
from vmbus.provision.initramfs import KERNEL_ARGUMENTS, build_initramfs
from vmbus.provision.kernel import DEFAULT_GUEST, GUESTS, GuestKernel, find_kernel
from vmbus.provision.qemu import find_qemu
from vmbus.provision.unpacked import fastest_image

from tests.guest.matrix import full
from tests.guest.waiting import LIMIT, Process, until_blocking

pytestmark = pytest.mark.guest

EVERY_BYTE = bytes(range(256)) * 16


@dataclass
class Finished:
    """A guest that has ended."""

    output: bytes
    status: int | None
    exit_code: int
    console: str


def run(kernel: GuestKernel, image: Path, folder: Path) -> Finished:
    """Boot ``image`` until QEMU ends; no wait is longer than ``LIMIT`` seconds."""
    qemu = find_qemu()
    console = folder / "console"
    with contextlib.closing(socket.socket(socket.AF_UNIX)) as listener:
        listener.bind(str(folder / "port"))
        listener.listen()
        listener.setblocking(False)
        command = [
            *qemu.argv_prefix,
            *(
                "-accel",
                "tcg",
                "-machine",
                "q35",
                "-m",
                "512",
                "-display",
                "none",
                "-nodefaults",
                "-no-reboot",
            ),
            *("-serial", f"file:{console}", "-serial", f"unix:{folder / 'port'}"),
            *("-kernel", str(fastest_image(kernel)), "-initrd", str(image)),
            *("-append", " ".join(KERNEL_ARGUMENTS)),
        ]
        with subprocess.Popen(command, env={**os.environ, **qemu.environment}) as process:
            try:
                side = Process("QEMU", process, console)
                until_blocking(lambda: select.select([listener], [], [], 0)[0], "connection of QEMU", side)
                port, _ = listener.accept()
                received = CommandOutput()
                output = b"".join(received.feed(data) for data in _until_closed(port))
                output += received.close()
                exit_code = process.wait(timeout=LIMIT)
            finally:
                process.kill()
    return Finished(output, received.status, exit_code, console.read_text(errors="replace"))


def _until_closed(port: socket.socket) -> Iterator[bytes]:
    with port:
        port.settimeout(LIMIT)
        while data := port.recv(65536):
            yield data


def kernel_of(name: str) -> GuestKernel:
    try:
        find_qemu()
        return find_kernel(name)
    except MissingRequirement as missing:
        pytest.skip(str(missing))


@pytest.mark.parametrize("name", [name if name == DEFAULT_GUEST else full(name) for name in sorted(GUESTS)])
def test_a_command_s_output_and_status_come_back_and_the_guest_powers_off(name: str, tmp_path: Path) -> None:
    kernel = kernel_of(name)
    script = "cat; uname -r; lsmod | grep -c ^sd_mod; exit 7"
    image = build_initramfs(
        kernel, modules=["sd_mod"], command=["sh", "-c", script], stdin=EVERY_BYTE + b"\x10\x03vmbus-exit 3\n"
    )
    done = run(kernel, image, tmp_path)
    expected = EVERY_BYTE + f"\x10\x03vmbus-exit 3\n{kernel.release}\n1\n".encode()
    assert done.output == expected
    assert (done.status, done.exit_code) == (7, 0)
    assert "reboot: Power down" in done.console


@pytest.mark.parametrize("name", sorted(GUESTS))
def test_every_debian_guest_has_drivers_for_the_usual_devices(name: str) -> None:
    modules = kernel_of(name).modules
    assert modules is not None
    info = guest_info(modules)
    assert info.bus in ("module", "built-in")
    assert {"heartbeat", "shutdown", "SCSI storage", "network"} <= {driver.device for driver in info.drivers}


def test_a_command_killed_by_poweroff_has_no_status(tmp_path: Path) -> None:
    kernel = kernel_of(DEFAULT_GUEST)
    image = build_initramfs(kernel, command=["sh", "-c", "echo first; /sbin/poweroff; sleep 100"])
    done = run(kernel, image, tmp_path)
    assert (done.output, done.status, done.exit_code) == (b"first\n", None, 0)
    assert "reboot: Power down" in done.console


def test_a_reboot_from_inside_restarts_the_machine(tmp_path: Path) -> None:
    kernel = kernel_of(DEFAULT_GUEST)
    image = build_initramfs(kernel, command=["sh", "-c", "/sbin/reboot; sleep 100"])
    done = run(kernel, image, tmp_path)  # -no-reboot makes QEMU end instead
    assert (done.status, done.exit_code) == (None, 0)
    assert "reboot: Restarting system" in done.console
