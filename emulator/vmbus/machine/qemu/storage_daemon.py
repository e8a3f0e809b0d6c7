"""Serves images of QEMU's formats: one ``qemu-storage-daemon`` for each image, a child of this process.

It leaves nothing in the file system: the daemon gets a listening socket that is connected to already, and its
control connection (QMP) is its standard input and output. Over that the image is examined, opened and served: only
files that the user named are opened (:mod:`vmbus.machine.qemu.image_files`). The kernel kills the daemon when this
process ends.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import select
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from vmbus.bus.io.snapshots import DiskSnapshot
from vmbus.errors import DeviceError, MissingRequirement, UserError
from vmbus.machine import unix_path
from vmbus.machine.qemu import confined, image_snapshots
from vmbus.machine.qemu.child import in_child
from vmbus.machine.qemu.image_files import Image, examine
from vmbus.provision.qemu import QemuBinary, find_qemu

_logger = logging.getLogger(__name__)

START_TIMEOUT = 30.0
"""Seconds to open an image."""
RESIZE_TIMEOUT = 300.0
"""Seconds to make an image larger."""
STOP_TIMEOUT = 10.0
"""Seconds for a daemon to write back its caches and end."""
_QUIT = b'{"execute": "qmp_capabilities"}\n{"execute": "quit"}\n'
_MAX_ANSWER = 16 << 20
"""Bytes of one answer on the control connection."""


def private_connections(count: int) -> tuple[socket.socket, list[socket.socket]]:
    """Return a listening socket without a name in the file system, and ``count`` connections to it."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connections: list[socket.socket] = []
    try:
        with (
            tempfile.TemporaryDirectory(prefix="vmbus-") as folder,  # only this user can read it
            unix_path.short(Path(folder) / "nbd") as path,
        ):
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
        self._received = b""
        self._deadline = 0.0
        self.process: subprocess.Popen[bytes] | None = None
        self.clean = True
        """Whether the last daemon ended properly: all that was written is in the image."""

    def start(self, connections: int) -> list[socket.socket]:
        """Open and serve the image; return that many NBD connections. Raises :class:`~vmbus.errors.DeviceError`."""
        self.stop()
        listener, found = private_connections(connections)
        try:
            with listener:
                self._start(listener)
            self._open()
            self._execute(
                "block-export-add",
                **{
                    "type": "nbd",
                    "id": "export",
                    "node-name": "image",
                    "name": "disk",
                    "writable": not self._image.read_only,
                },
            )
        except BaseException:
            for each in found:
                each.close()
            self.stop()
            raise
        return found

    def resize(self, size: int) -> None:
        """Grow the image, which is not open, to ``size`` bytes. Raises :class:`~vmbus.errors.DeviceError`."""
        with self._only_open():
            nodes = self._execute("query-named-block-nodes", flat=True)
            [present] = [each["image"]["virtual-size"] for each in nodes if each["node-name"] == "image"]
            if size < present:
                raise DeviceError(f"it has {present} bytes, and an image cannot be made smaller")
            self._deadline = time.monotonic() + RESIZE_TIMEOUT
            self._execute("block_resize", **{"node-name": "image", "size": size})

    def save_snapshot(self, name: str) -> None:
        """Make an internal snapshot of the image, which is not open. Raises :class:`~vmbus.errors.DeviceError`."""
        self._snapshot("blockdev-snapshot-internal-sync", name)

    def delete_snapshot(self, name: str) -> None:
        """Delete an internal snapshot of the image, which is not open. Raises :class:`~vmbus.errors.DeviceError`."""
        self._snapshot("blockdev-snapshot-delete-internal-sync", name)

    def _snapshot(self, command: str, name: str) -> None:
        with self._only_open():
            self._deadline = time.monotonic() + image_snapshots.TIMEOUT
            self._execute(command, device="image", name=name)
        if not self.clean:
            raise DeviceError("the storage daemon did not end properly")

    @contextlib.contextmanager
    def _only_open(self) -> Iterator[None]:
        """Have the image open, for commands, and serve it to nobody."""
        self.stop()
        try:
            self._start(None)
            self._open()
            yield
        finally:
            self.stop()

    def _start(self, listener: socket.socket | None) -> None:
        line = [*self._program, "--chardev", "stdio,id=control", "--monitor", "chardev=control"]
        if listener is not None:
            line += ["--nbd-server", f"addr.type=fd,addr.str={listener.fileno()}"]
        self._messages = tempfile.TemporaryFile()  # noqa: SIM115 - closed in stop()
        self._received = b""
        with in_child(confined.storage_daemon(self._program, self._image)) as prepare:
            self.process = subprocess.Popen(
                line,
                env=self._environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._messages,
                bufsize=0,
                pass_fds=() if listener is None else (listener.fileno(),),
                start_new_session=True,
                preexec_fn=prepare,
            )
        self._deadline = time.monotonic() + START_TIMEOUT
        if "QMP" not in self._answer():
            raise DeviceError("qemu-storage-daemon does not greet")
        self._execute("qmp_capabilities")

    def _open(self) -> None:
        """Open the image, with the files that the user allows, and nothing else."""
        try:
            tree = examine(self._image, self._execute)
        except OSError as error:
            raise DeviceError(f"{error.filename or self._image.path}: {error.strerror}") from error
        self._execute("blockdev-add", **tree.node)
        tree.check(self._execute)

    def _execute(self, command: str, **arguments: Any) -> Any:
        """Execute a QMP command and return its result. Raises :class:`~vmbus.errors.DeviceError`."""
        process = self.process
        if process is None or process.stdin is None:
            raise DeviceError("qemu-storage-daemon does not run")
        with contextlib.suppress(OSError):  # it has ended, and its messages say why
            process.stdin.write(json.dumps({"execute": command, "arguments": arguments}).encode() + b"\n")
        while True:
            answer = self._answer()
            if "error" in answer:
                raise DeviceError(" ".join(str(answer["error"]["desc"]).split()))
            if "return" in answer:
                return answer["return"]

    def _answer(self) -> dict[str, Any]:
        """Return the next object that the daemon sends."""
        process = self.process
        if process is None or process.stdout is None:
            raise DeviceError("qemu-storage-daemon does not run")
        while b"\n" not in self._received:
            left = max(self._deadline - time.monotonic(), 0)
            if not select.select([process.stdout], [], [], left)[0]:
                raise DeviceError("qemu-storage-daemon did not answer in time")
            data = process.stdout.read(1 << 16)
            if not data:
                raise DeviceError(self.messages() or f"ended with status {process.wait()}")
            self._received += data
            if len(self._received) > _MAX_ANSWER:
                raise DeviceError("qemu-storage-daemon sends an answer without end")
        line, _, self._received = self._received.partition(b"\n")
        try:
            found = json.loads(line)
        except ValueError as error:
            raise DeviceError("qemu-storage-daemon sends no JSON") from error
        return found if isinstance(found, dict) else {}

    def messages(self) -> str:
        """Return the daemon's messages on standard error."""
        if self._messages is None:
            return ""
        self._messages.seek(0)
        text = self._messages.read().decode(errors="replace").strip()
        return " ".join(text.removeprefix("qemu-storage-daemon: ").split())

    def stop(self) -> None:
        """End the daemon, if it runs, and log its messages."""
        process, self.process = self.process, None
        if process is not None:
            with contextlib.suppress(OSError):  # it has ended already
                if process.stdin is not None:
                    process.stdin.write(_QUIT)
            try:
                process.wait(STOP_TIMEOUT)
            except subprocess.TimeoutExpired:
                _logger.warning(
                    "the storage daemon of %s did not end in time and is killed", self._image.path
                )
                process.kill()
                process.wait()
            self.clean = process.returncode == 0
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

    def snapshots(self, image: Image) -> list[DiskSnapshot]:
        """Return the internal snapshots of ``image``. Raises :class:`~vmbus.errors.DeviceError`."""
        return image_snapshots.read_snapshots(image)

    def load_snapshot(self, image: Image, name: str) -> None:
        """Put ``image``, which is not open, back to a snapshot. Raises :class:`~vmbus.errors.DeviceError`."""
        image_snapshots.put_back(self.qemu.qemu_img(), self.qemu.environment, image, name)

    def resize(self, image: Image, size: int) -> None:
        """Resize ``image`` to ``size`` bytes. Raises :class:`~vmbus.errors.UserError`."""
        try:
            self.server(image).resize(size)
        except DeviceError as error:
            raise UserError(f"cannot resize {image.path}: {error}") from error
