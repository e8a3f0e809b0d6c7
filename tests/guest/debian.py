"""A Debian system on a disk, and a shell in it: root's, on the second serial port."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import subprocess
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import pytest
from vmbus.errors import MissingRequirement
from vmbus.provision.system_disk import copy_system, find_system

from tests.guest.harness import DEFAULT_DEVICES, Booted, boot
from tests.guest.waiting import LIMIT, section, while_alive

ROOT = "/dev/sda1"
FILE_SYSTEM_AT = 1 << 20
HYPER_V_SMBIOS = ("-smbios", "type=1,manufacturer=Microsoft Corporation,product=Virtual Machine")
"""What Hyper-V's firmware says; systemd takes a Hyper-V whose firmware says QEMU for QEMU's imitation of one."""


def system_image() -> Path:
    """Return the image that copies are made of. It is not written to; guests may share it with ``readonly=on``."""
    try:
        return find_system()
    except MissingRequirement as missing:
        if os.geteuid():
            pytest.skip(str(missing))
        raise


def system_copy(folder: Path) -> Path:
    """A disk of one's own."""
    image = folder / "debian.img"
    copy_system(system_image(), image)
    return image


def check_file_system(image: Path, *options: str) -> None:
    """e2fsck of a raw image finds nothing; ``options`` as e2fsck's, -fn by default."""
    e2fsck = shutil.which("e2fsck", path=f"{os.environ['PATH']}:/usr/sbin:/sbin")
    if e2fsck is None:
        pytest.skip("e2fsck (package e2fsprogs) is not installed")
    done = subprocess.run(
        [e2fsck, *(options or ("-fn",)), f"{image}?offset={FILE_SYSTEM_AT}"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


class Shell:
    """Root's shell in the system; one command at a time."""

    def __init__(self, guest: Booted, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._guest = guest
        self._reader = reader
        self._writer = writer
        self._count = 0
        self.heard = ""

    def gone(self) -> str:
        return self._guest.gone()

    def report(self) -> str:
        return section("shell", self.heard[-8000:]) + "\n" + self._guest.report()

    async def _until(self, text: str, timeout: float) -> str:
        """Return what comes before ``text``."""
        async with while_alive(f"{text!r} from the shell", self, timeout=timeout):
            while text not in self.heard:
                data = await self._reader.read(65536)
                assert data, f"the port was closed while waiting for {text!r}: {self.heard}"
                self.heard += data.decode(errors="replace")
        before, _, self.heard = self.heard.partition(text)
        return before

    async def ready(self, timeout: float = LIMIT) -> None:
        """Wait until root is logged in, after a boot."""
        await self._until("root@debian:~# ", timeout)
        # bash edits lines, and echoes them; dash does neither
        self.send("stty -echo; PS1= PS2= DEBIAN_FRONTEND=noninteractive exec dash")
        await self._until("exec dash", timeout)
        await self.run("true")

    async def run(self, command: str, timeout: float = LIMIT) -> tuple[int, str]:
        """Exit status and output of a shell line."""
        self._count += 1
        self.send(f"{{ {command}\n}} </dev/null; echo end-'{self._count}' $?.")
        output = await self._until(f"end-{self._count} ", timeout)
        status = await self._until(".", timeout)
        return int(status), output.replace("\r\n", "\n").strip("\n")

    async def does(self, command: str, timeout: float = LIMIT) -> str:
        """The output of a shell line that succeeds."""
        status, output = await self.run(command, timeout)
        assert status == 0, f"{command}: status {status}\n{output}"
        return output

    def send(self, line: str) -> None:
        """A line whose end is not waited for."""
        self._writer.write(f"{line}\n".encode())

    def close(self) -> None:
        self._writer.close()


@contextlib.asynccontextmanager
async def boot_debian(
    folder: Path, disk: str, *, devices: Sequence[str] = DEFAULT_DEVICES, smp: int = 2, memory: int = 512
) -> AsyncIterator[tuple[Booted, Shell]]:
    """Boot the system on ``disk`` (options of a ``--device scsi`` line); ``devices`` are offered besides."""
    port = folder / "port"
    async with boot(
        folder,
        smp=smp,
        memory=memory,
        root=ROOT,
        devices=(*devices, f"scsi,{disk}"),
        extra=("-serial", f"unix:{port},server=on,wait=off", *HYPER_V_SMBIOS),
    ) as guest:
        shell = Shell(guest, *await asyncio.open_unix_connection(str(port)))
        try:
            await shell.ready()
            yield guest, shell
        finally:
            shell.close()
