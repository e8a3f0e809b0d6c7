"""Serves images of QEMU's formats: one ``qemu-storage-daemon`` for each image, a child of this process.

It leaves nothing in the file system: the daemon gets a listening socket that is connected to already, and its
control connection (QMP) is its standard input and output. Its greeting there means that the image is open and served.
The kernel kills the daemon when this process ends.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import select
import socket
import stat
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Protocol

from vmbus.errors import DeviceError, MissingRequirement, UserError
from vmbus.machine.qemu.child import end_with_parent
from vmbus.provision.qemu import QemuBinary, find_qemu

_logger = logging.getLogger(__name__)

START_TIMEOUT = 30.0
"""Seconds to open an image."""
STOP_TIMEOUT = 10.0
"""Seconds for a daemon to write back its caches and end."""
_QUIT = b'{"execute": "qmp_capabilities"}\n{"execute": "quit"}\n'


class Image(Protocol):
    """The part of an image that is used here; the class is in device/vmbus_devices/scsi/image.py."""

    @property
    def path(self) -> Path: ...
    @property
    def format(self) -> str: ...
    @property
    def read_only(self) -> bool: ...
    @property
    def share(self) -> bool: ...
    @property
    def discard(self) -> bool: ...
    @property
    def cache(self) -> Any: ...
    @property
    def detect_zeroes(self) -> Any: ...


def block_device(image: Image) -> dict[str, Any]:
    """Return the ``--blockdev`` of an image."""
    direct = image.cache.value in ("none", "directsync") and _direct_io(image.path)
    common = {
        "discard": "unmap" if image.discard else "ignore",
        "cache": {"direct": direct, "no-flush": image.cache.value == "unsafe"},
        "read-only": image.read_only,
    }
    kind = "host_device" if stat.S_ISBLK(image.path.stat().st_mode) else "file"
    return {
        "driver": image.format,
        "node-name": "image",
        "detect-zeroes": "off" if image.read_only else image.detect_zeroes.value,
        "force-share": image.share,
        "file": {"driver": kind, "filename": str(image.path.absolute()), **common},
        **common,
    }


def _direct_io(path: Path) -> bool:
    try:
        os.close(os.open(path, os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC))
    except OSError:
        return False
    return True


def private_connections(count: int) -> tuple[socket.socket, list[socket.socket]]:
    """Return a listening socket without a name in the file system, and ``count`` connections to it."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connections: list[socket.socket] = []
    try:
        with tempfile.TemporaryDirectory(prefix="vmbus-") as folder:  # only this user can read it
            path = f"{folder}/nbd"
            listener.bind(path)
            listener.listen(count)
            for _ in range(count):
                connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
                connections.append(connection)
                connection.connect(path)
    except BaseException:
        for each in (listener, *connections):
            each.close()
        raise
    return listener, connections


class StorageDaemon:
    """The server of one image; ``program``: command line prefix of ``qemu-storage-daemon``."""

    def __init__(
        self, program: Sequence[str], image: Image, environment: Mapping[str, str] | None = None
    ) -> None:
        self._program = tuple(program)
        self._image = image
        self._environment = {**os.environ, **(environment or {})}
        self._messages: IO[bytes] | None = None
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, connections: int) -> list[socket.socket]:
        """Start the daemon; return that many NBD connections to it. Raises :class:`~vmbus.errors.DeviceError`."""
        self.stop()
        try:
            node = json.dumps(block_device(self._image))
        except OSError as error:
            raise DeviceError(f"{self._image.path}: {error.strerror}") from error
        listener, found = private_connections(connections)
        try:
            with listener:
                self._start(listener, node)
            self._wait_until_ready()
        except BaseException:
            for each in found:
                each.close()
            self.stop()
            raise
        return found

    def _start(self, listener: socket.socket, node: str) -> None:
        writable = "off" if self._image.read_only else "on"
        line = [
            *self._program,
            *("--blockdev", node),
            *("--nbd-server", f"addr.type=fd,addr.str={listener.fileno()}"),
            *("--export", f"type=nbd,id=export,node-name=image,name=disk,writable={writable}"),
            *("--chardev", "stdio,id=control", "--monitor", "chardev=control"),
        ]
        self._messages = tempfile.TemporaryFile()  # noqa: SIM115 - closed in stop()
        self.process = subprocess.Popen(
            line,
            env=self._environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._messages,
            pass_fds=(listener.fileno(),),
            start_new_session=True,
            preexec_fn=end_with_parent(),
        )

    def _wait_until_ready(self) -> None:
        process = self.process
        if process is None or process.stdout is None:
            return
        readable, _, _ = select.select([process.stdout], [], [], START_TIMEOUT)
        if not readable:
            raise DeviceError(
                f"{self._image.path}: qemu-storage-daemon did not open it within {START_TIMEOUT:g} s"
            )
        if not process.stdout.readline().startswith(b'{"QMP"'):
            raise DeviceError(self.messages() or f"ended with status {process.wait()}")

    def messages(self) -> str:
        """Return the daemon's messages on standard error, without the options that it repeats."""
        if self._messages is None:
            return ""
        self._messages.seek(0)
        text = self._messages.read().decode(errors="replace").strip()
        text = text.removeprefix("qemu-storage-daemon: ")
        if text.startswith("--blockdev {") and "}: " in text:
            text = text.rpartition("}: ")[2]
        return " ".join(text.split())

    def stop(self) -> None:
        """End the daemon, if it runs, and log its messages."""
        process, self.process = self.process, None
        if process is not None:
            with contextlib.suppress(OSError):  # it has ended already
                if process.stdin is not None:
                    process.stdin.write(_QUIT)
                    process.stdin.flush()
            try:
                process.wait(STOP_TIMEOUT)
            except subprocess.TimeoutExpired:
                _logger.warning(
                    "the storage daemon of %s did not end in time and is killed", self._image.path
                )
                process.kill()
                process.wait()
            for stream in (process.stdin, process.stdout):
                if stream is not None:
                    with contextlib.suppress(OSError):  # data for a daemon that had ended
                        stream.close()
        if self._messages is not None:
            if text := self.messages():
                _logger.info("the storage daemon of %s printed: %s", self._image.path, text)
            self._messages.close()
            self._messages = None


class QemuImages:
    """Serves images with the tools of a QEMU, which ``find`` finds when the first image needs it."""

    def __init__(self, find: Callable[[], QemuBinary] = find_qemu) -> None:
        self._find = find
        self._qemu: QemuBinary | None = None

    @property
    def qemu(self) -> QemuBinary:
        """The QEMU. Raises :class:`~vmbus.errors.MissingRequirement`."""
        if self._qemu is None:
            self._qemu = self._find()
        return self._qemu

    def server(self, image: Image) -> StorageDaemon:
        """Return a server of ``image``, not started. Raises :class:`~vmbus.errors.MissingRequirement`."""
        try:
            program = self.qemu.tool("qemu-storage-daemon")
        except MissingRequirement as error:
            raise MissingRequirement(f"format={image.format} needs qemu-storage-daemon: {error}") from error
        return StorageDaemon(program, image, self.qemu.environment)

    def resize(self, image: Image, size: int) -> None:
        """Resize ``image`` to ``size`` bytes. Raises :class:`~vmbus.errors.UserError`."""
        line = [*self.qemu.qemu_img(), "resize", "-q", "-f", image.format, str(image.path), str(size)]
        done = subprocess.run(line, capture_output=True, text=True, check=False)
        if done.returncode:
            raise UserError(f"cannot resize {image.path}: {done.stderr.strip()}")
