"""Starts a QEMU for ``vmbus run`` and ends it: no process outlives the emulator.

The child gets ``PR_SET_PDEATHSIG``: when the emulator is killed, even with SIGKILL, the kernel ends QEMU.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from vmbus.errors import QemuError, QemuUnsuitable
from vmbus.machine.bounded_log import BoundedLog, LogCopy
from vmbus.machine.qemu.arguments import EmulatorOptions, escape
from vmbus.machine.qemu.boot_media import NO_MEDIA, BootMedia
from vmbus.machine.qemu.child import in_child
from vmbus.machine.qemu.qmp import Qmp
from vmbus.machine.rundir import RunDirectory
from vmbus.sandbox import confinement as sandbox
from vmbus.sandbox.confinement import Confinement

_REFUSED = ("Permission denied", "Operation not permitted")
_POLL = 0.01
"""Seconds between two attempts to connect."""

_KEPT_MESSAGES = 1 << 18
"""Bytes of the beginning, and of the end, of what QEMU prints. A guest can make QEMU print."""

SNAPSHOT_NODE = "vmbus-snapshots"
"""The block node of :attr:`GuestOptions.snapshots`."""


@dataclass(frozen=True, slots=True)
class GuestOptions:
    """The guest that ``vmbus run`` starts."""

    kernel: Path | None
    """The kernel that QEMU loads; ``None``: the firmware boots from ``media``, or from drives in ``extra``."""
    initrd: Path | None = None
    append: str = ""
    machine: str = "q35"
    cpu: str = "max"
    smp: int = 1
    serial: Path | None = None
    """The console's file; ``None``: the one in the run directory."""
    console_socket: bool = False
    """Whether the console goes to the socket in the run directory, of which somebody writes the file."""
    command_port: bool = False
    incoming: bool = False
    """Wait for a migration (``migrate-incoming``) instead of booting."""
    snapshots: Path | None = None
    """A qcow2 image for snapshots; the guest does not see it."""
    media: BootMedia = NO_MEDIA
    reachable: tuple[Path, ...] = ()
    """Files and folders that QEMU may use besides those on its command line: for what is named later over QMP."""
    reserve_memory: bool = True
    """Whether the memory file has all of its room from the start; else QEMU is killed when there is none left."""
    extra: tuple[str, ...] = ()


def command_line(
    prefix: Sequence[str],
    directory: RunDirectory,
    emulator: EmulatorOptions | None,
    guest: GuestOptions,
    name: str | None = None,
) -> list[str]:
    """Return the QEMU command line. ``emulator`` is ``None`` for a guest without gateway (benchmarks).

    ``name``: name of the guest, if it differs from that of the directory.
    """
    line = [
        *prefix,
        "-name",
        f"guest={name or directory.name}",
        "-no-user-config",
        "-nodefaults",
        "-display",
        "none",
    ]
    line += ["-machine", guest.machine, "-cpu", guest.cpu]
    # With at most one vCPU, TCG translates its locked instructions to plain ones (see ``discovery``).
    line += ["-smp", f"{guest.smp},maxcpus={max(guest.smp, 2)}" if emulator is not None else str(guest.smp)]
    if emulator is not None:
        line += emulator.argv()
    line += ["-qmp", f"unix:{escape(directory.user_qmp)},server=on,wait=off"]
    if guest.console_socket:
        console = f"socket,id=console,path={escape(directory.console_socket)},server=on,wait=off"
    else:
        file = escape(guest.serial or directory.console)
        console = f"file,id=console,path={file}{',append=on' if guest.incoming else ''}"
    line += ["-chardev", console, "-serial", "chardev:console"]
    if guest.command_port:
        line += ["-chardev", f"socket,id=command,path={escape(directory.command)},server=on,wait=off"]
        line += ["-serial", "chardev:command"]
    if guest.kernel is not None:
        line += ["-kernel", str(guest.kernel)]
        if guest.initrd is not None:
            line += ["-initrd", str(guest.initrd)]
        line += ["-append", guest.append]
    else:
        # SeaBIOS, and boot loaders that print through it, then use the serial port, too.
        line += ["-machine", "graphics=off"]
    line += guest.media.argv()
    if guest.snapshots is not None:
        image = {"driver": "file", "filename": str(guest.snapshots)}
        # No file that the image itself names is opened; an external data file was refused before.
        node = {"driver": "qcow2", "node-name": SNAPSHOT_NODE, "file": image, "backing": None}
        line += ["-blockdev", json.dumps(node)]
    if guest.incoming:
        line += ["-incoming", "defer"]
    line += guest.extra
    return line


class QemuProcess:
    """A QEMU that is a child of this process."""

    def __init__(
        self, process: subprocess.Popen[bytes], log: Path, copy: LogCopy, *, confined: bool = False
    ) -> None:
        self.process = process
        self._log = log
        self._copy = copy
        self._confined = confined

    @classmethod
    def start(
        cls,
        line: Sequence[str],
        log: Path,
        environment: Mapping[str, str] | None = None,
        confinement: Confinement | None = None,
    ) -> QemuProcess:
        """Start QEMU; its messages go to ``log``. ``environment`` is added to this process's own."""
        bounded = BoundedLog(log, _KEPT_MESSAGES)
        messages, output = os.pipe()
        try:
            with in_child(confinement) as prepare:
                process = subprocess.Popen(
                    list(line),
                    env={**os.environ, **(environment or {})},
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    preexec_fn=prepare,
                )
        except BaseException:
            os.close(messages)
            bounded.close()
            raise
        finally:
            os.close(output)
        copy = LogCopy(messages, bounded, close_log=True)
        return cls(process, log, copy, confined=confinement is not None and sandbox.enabled())

    @property
    def pid(self) -> int:
        return self.process.pid

    def messages(self, lines: int = 12) -> str:
        """Return the last ``lines`` that QEMU printed, and what its sandbox may have to do with its end."""
        if self.process.poll() is not None:
            self._copy.wait()
        try:
            text = "\n".join(self._log.read_text(errors="replace").splitlines()[-lines:])
        except FileNotFoundError:
            text = ""
        if self.process.poll() == -signal.SIGSYS:
            return (
                f"{text}\nits sandbox ended it, because it made a system call that starts a program or gains "
                "privileges; if you want that, use --sandbox off"
            ).strip()
        if self._confined and any(each in text for each in _REFUSED):
            return (
                f"{text}\nin its sandbox, QEMU can open only the files on its command line: name others with "
                "--allow PATH, or use --sandbox off"
            )
        return text

    def ending(self) -> str:
        """Return how QEMU has ended, in words, with the reason as far as it can be known."""
        status = self.process.returncode
        if status is None or status >= 0:
            return f"QEMU ended with status {status}"
        name = signal.Signals(-status).name if -status in set(signal.Signals) else f"signal {-status}"
        reasons: dict[int, str] = {
            signal.SIGBUS: ": the file system of the guest's memory is full. Free some space there, or do not use "
            "--no-reserve",
            signal.SIGKILL: ": by a person, or by the kernel because the machine had no memory left",
        }
        return f"QEMU was killed by {name}{reasons.get(-status, '')}"

    async def connect_qmp(self, path: Path, timeout: float = 30.0) -> Qmp:
        """Connect as soon as QEMU listens.

        Raises :class:`~vmbus.errors.QemuError` if QEMU ends instead, or after ``timeout`` seconds.
        """
        end = asyncio.get_running_loop().time() + timeout
        while True:
            if self.process.poll() is not None:
                raise QemuError(f"{self.ending()} before it was ready:\n{self.messages()}")
            if path.exists():
                try:
                    return await Qmp.connect(str(path))
                except QemuUnsuitable:
                    if asyncio.get_running_loop().time() > end:
                        raise
            elif asyncio.get_running_loop().time() > end:
                raise QemuError(f"QEMU made no QMP socket {path} within {timeout:g} s:\n{self.messages()}")
            await asyncio.sleep(_POLL)

    async def wait(self) -> int:
        """Wait for the end of QEMU; return its exit status, negative for a signal."""
        return await asyncio.to_thread(self.process.wait)

    def stop(self, grace: float = 5.0) -> None:
        """End QEMU with SIGTERM, and with SIGKILL after ``grace`` seconds."""
        if self.process.poll() is not None:
            return
        self.process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(grace)
            return
        self.process.kill()
        self.process.wait()
