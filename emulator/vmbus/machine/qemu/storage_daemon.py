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
from typing import Any

from vmbus.bus.io.snapshots import DiskSnapshot
from vmbus.errors import DeviceError, MissingRequirement, UserError
from vmbus.machine import unix_path
from vmbus.machine.bounded_log import BoundedText, LogCopy
from vmbus.machine.qemu import confined, image_snapshots
from vmbus.machine.qemu.child import in_child
from vmbus.machine.qemu.image_files import Chain, Image, Tree, examine
from vmbus.provision.qemu import QemuBinary, find_qemu

_logger = logging.getLogger(__name__)

START_TIMEOUT = 30.0
"""Seconds to open an image."""
RESIZE_TIMEOUT = 300.0
"""Seconds to make an image larger."""
STOP_TIMEOUT = 10.0
"""Seconds for a daemon to write back its caches and end."""
_QUIT = b'{"execute": "qmp_capabilities"}\n{"execute": "quit"}\n'
_KEPT_MESSAGES = 16 << 10
"""Bytes of the beginning, and of the end, of what a daemon prints: an image can make it print."""
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
        self,
        program: Sequence[str],
        image: Image,
        environment: Mapping[str, str] | None = None,
        *,
        seen: Chain | None = None,
    ) -> None:
        """``seen``: what another server of this image has found."""
        self._program = tuple(program)
        self._image = image
        self._environment = {**os.environ, **(environment or {})}
        self._messages: BoundedText | None = None
        self._copy: LogCopy | None = None
        self._received = b""
        self._deadline = 0.0
        self.chain = seen
        """The images, as they were found last."""
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
            self._execute("block-export-add", **self._nbd())
        except BaseException:
            for each in found:
                each.close()
            self.stop()
            raise
        return found

    def start_with_queue(
        self, connections: int, *, writethrough: bool
    ) -> tuple[list[socket.socket], socket.socket | None]:
        """Open and serve the image, as :meth:`start` does, and over one vhost-user connection, too.

        ``writethrough``: of the latter, every write is safe when it is answered. Without that connection where this
        qemu-storage-daemon cannot have one.

        An export that is added over QMP has to name its socket by a path, and the daemon would have to bind it. So
        one daemon examines the image, unless it is as it was, and the command line of another has the nodes and the
        exports.
        """
        try:
            tree = self._examined()
        finally:
            self.stop()
        listener, found = private_connections(connections)
        queue_listener, [queue] = private_connections(1)
        node = json.dumps(tree.node)
        words = ["--blockdev", node]
        for export in (self._nbd(), self._vhost_user(queue_listener, writethrough=writethrough)):
            words += ["--export", json.dumps(export)]
        try:
            with listener, queue_listener:
                self._start(listener, words, [queue_listener])
            tree.check(self._execute)
        except DeviceError as error:
            for each in (*found, queue):
                each.close()
            self._forget_failed()
            text = str(error)
            if text.startswith("--export "):
                _logger.info("the image %s is served over NBD alone: %s", self._image.path, text)
                return self.start(connections), None
            raise DeviceError(text.removeprefix(f"--blockdev {node}: ")) from error
        except BaseException:
            for each in (*found, queue):
                each.close()
            self.stop()
            raise
        return found, queue

    def _forget_failed(self) -> None:
        """End a daemon that did not begin to serve; if it has ended, the error says what it printed."""
        process = self.process
        if process is None or process.poll() is None:
            self.stop()
            return
        self.process = None
        for stream in (process.stdin, process.stdout):
            if stream is not None:
                with contextlib.suppress(OSError):  # data for a daemon that had ended
                    stream.close()
        if self._copy is not None:
            self._copy.wait()
        self._messages = self._copy = None

    def _examined(self) -> Tree:
        """Return the nodes of the image, which no daemon has open yet."""
        self.stop()
        if (tree := self._seen()) is not None:
            return tree
        self._start(None)
        return self._examine()

    def _seen(self) -> Tree | None:
        """Return the nodes of the image if it is as it was when it was examined."""
        if self.chain is None or not self.chain.unchanged():
            return None
        return self.chain.tree(self._image)

    def _nbd(self) -> dict[str, Any]:
        return {
            "type": "nbd",
            "id": "export",
            "node-name": "image",
            "name": "disk",
            "writable": not self._image.read_only,
        }

    def _vhost_user(self, listener: socket.socket, *, writethrough: bool) -> dict[str, Any]:
        return {
            "type": "vhost-user-blk",
            "id": "queue",
            "node-name": "image",
            "writable": not self._image.read_only,
            "writethrough": writethrough,
            "addr": {"type": "fd", "str": str(listener.fileno())},
        }

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

    def _start(
        self,
        listener: socket.socket | None,
        words: Sequence[str] = (),
        more_listeners: Sequence[socket.socket] = (),
    ) -> None:
        line = [*self._program, "--chardev", "stdio,id=control", "--monitor", "chardev=control"]
        if listener is not None:
            line += ["--nbd-server", f"addr.type=fd,addr.str={listener.fileno()}"]
        line += words
        listeners = [*([] if listener is None else [listener]), *more_listeners]
        self._received = b""
        printed, output = os.pipe()
        try:
            with in_child(confined.storage_daemon(self._program, self._image)) as prepare:
                self.process = subprocess.Popen(
                    line,
                    env=self._environment,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=output,
                    bufsize=0,
                    pass_fds=[each.fileno() for each in listeners],
                    preexec_fn=prepare,
                )
        except BaseException:
            os.close(printed)
            raise
        finally:
            os.close(output)
        self._messages = BoundedText(_KEPT_MESSAGES)
        self._copy = LogCopy(printed, self._messages, close_log=False)
        self._deadline = time.monotonic() + START_TIMEOUT
        if "QMP" not in self._answer():
            raise DeviceError("qemu-storage-daemon does not greet")
        self._execute("qmp_capabilities")

    def _open(self) -> None:
        """Open the image, with the files that the user allows, and nothing else."""
        tree = self._seen() or self._examine()
        self._execute("blockdev-add", **tree.node)
        tree.check(self._execute)

    def _examine(self) -> Tree:
        try:
            self.chain = examine(self._image, self._execute)
            return self.chain.tree(self._image)
        except OSError as error:
            raise DeviceError(f"{error.filename or self._image.path}: {error.strerror}") from error

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
                status = process.wait()
                raise DeviceError(self.messages() or f"ended with status {status}")
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
        """Return the beginning and the end of the daemon's messages on standard error."""
        if self._messages is None:
            return ""
        if self._copy is not None and self.process is not None and self.process.poll() is not None:
            self._copy.wait()
        return " ".join(self._messages.text().strip().removeprefix("qemu-storage-daemon: ").split())

    def stop(self) -> None:
        """End the daemon, if it runs, and log its messages: as a warning if it had ended by itself."""
        process, self.process = self.process, None
        died = process is not None and process.poll() is not None
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
        if self._copy is not None:
            self._copy.wait()
        text = self.messages()
        if died and process is not None:
            _logger.warning(
                "the storage daemon of %s had ended with status %d: %s",
                self._image.path,
                process.returncode,
                text or "no message",
            )
        elif text:
            _logger.info("the storage daemon of %s printed: %s", self._image.path, text)
        self._messages = self._copy = None


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

    def server(self, image: Image, *, seen: StorageDaemon | None = None) -> StorageDaemon:
        """Return a server of ``image``, not started; ``seen``: another one of this image, which has opened it.

        Raises :class:`~vmbus.errors.MissingRequirement`.
        """
        try:
            program = self.qemu.tool("qemu-storage-daemon")
        except MissingRequirement as error:
            raise MissingRequirement(f"format={image.format} needs qemu-storage-daemon: {error}") from error
        return StorageDaemon(program, image, self.qemu.environment, seen=None if seen is None else seen.chain)

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
