"""The side channel: a Unix socket or a file between two emulators, for a state that QEMU's stream cannot carry.

That is the case without ``dbus-vmstate``, and for a state of more than its 1 MiB. Layouts are in
:mod:`vmbus.wire.frame`.

    unix:PATH   the target listens; the source connects before it migrates, and sends ``migrate-continue`` when the
                target has checked the state and accepted it
    file:PATH   the source writes and flushes all of it before it sends ``migrate-continue``; the target reads it
                when memory has arrived. A refusal comes late: the source stays paused, and can be taken back

With ``dbus-vmstate``, QEMU's stream refers to the frame by its digest, and ``Load()`` refuses any other frame.
Without it, the user is responsible for that; only the UUIDs of the machines are compared. A target without one
chooses a random one for each connection, so that the frame of another connection is refused.

A state is the guest's memory map, its rings and its secrets, and it decides what the target does: both ends of a
socket, and the owner of a file, have to be this process's user (or root, from whom nothing is kept anyway). A socket
that was forwarded from another machine (``ssh -L``, ``socat``) belongs to the user who forwards it.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import secrets
import socket
import stat
import struct
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from uuid import UUID, uuid4

from vmbus import __version__, durable
from vmbus.errors import MalformedError, UsageError, UserError, VmbusError
from vmbus.machine.migration.ports import Monitor
from vmbus.saving import Reason, StateRefused
from vmbus.wire.frame import (
    DIGEST_SIZE,
    FORMAT,
    FRAME_HEADER,
    GREETING,
    MAX_LENGTH,
    REFERENCE,
    VERDICT,
    VERDICT_HEADER_SIZE,
    Frame,
    Greeting,
    GreetingFlags,
    Reference,
    Verdict,
    build_frame,
    frame_size,
    parse_frame,
)

_logger = logging.getLogger(__name__)

_TIMEOUT = 20.0
"""Seconds for a greeting, or for a frame and its verdict; the guest is stopped in that time."""

_MAX_FRAME = MAX_LENGTH + FRAME_HEADER.size + DIGEST_SIZE

CARRIED_LIMIT = MAX_LENGTH // 2
"""Maximum size of a state in bytes."""


@dataclass(frozen=True, slots=True)
class CarrierAddress:
    """``unix:PATH`` or ``file:PATH``."""

    kind: str
    path: Path

    @classmethod
    def parse(cls, text: str) -> CarrierAddress:
        """Parse the option's value. Raises :class:`~vmbus.errors.UsageError`."""
        kind, _, path = text.partition(":")
        if kind not in ("unix", "file") or not path:
            raise UsageError(f"--carrier {text}: write unix:PATH or file:PATH")
        return cls(kind, Path(path).absolute())

    def __str__(self) -> str:
        return f"{self.kind}:{self.path}"


_NO_MACHINE = UUID(int=0)
_CREDENTIALS = struct.Struct("=iII")  # struct ucred


def _ours(uid: int) -> bool:
    return uid in (os.geteuid(), 0)


def _check_peer(writer: asyncio.StreamWriter) -> None:
    """Raise ``PermissionError`` if the process at the other end of a Unix socket is another user's."""
    found: socket.socket = writer.get_extra_info("socket")
    data = found.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    pid, uid, _ = _CREDENTIALS.unpack(data)
    if not _ours(uid):
        raise PermissionError(
            f"process {pid} at the other end belongs to user {uid}, this one to user {os.geteuid()}; run both "
            "emulators as one user, or forward the socket as that user"
        )


class OutgoingCarrier:
    """The source's end, for a guest with the UUID ``machine``. Made by :meth:`open`."""

    def __init__(self, address: CarrierAddress, machine: UUID) -> None:
        self.address = address
        self.machine = machine
        """UUID for the frame."""
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None

    @classmethod
    async def open(cls, address: CarrierAddress, machine: UUID) -> OutgoingCarrier:
        """Connect and check the target's greeting. Raises :class:`~vmbus.errors.UserError`: nothing has changed."""
        made = cls(address, machine)
        if address.kind == "file":
            if not address.path.parent.is_dir():
                raise UserError(f"{address}: there is no directory {address.path.parent}")
            return made
        try:
            async with asyncio.timeout(_TIMEOUT):
                made._reader, made._writer = await asyncio.open_unix_connection(str(address.path))
                _check_peer(made._writer)
                greeting = GREETING.parse(await made._reader.readexactly(GREETING.size))
        except PermissionError as error:
            await made.close()
            raise UserError(f"no state is sent to {address}: {error}") from error
        except (OSError, EOFError, TimeoutError, MalformedError) as error:
            await made.close()
            raise UserError(
                f"no emulator receives a state at {address} ({error}): start the target with --carrier {address}"
            ) from error
        except BaseException:  # cancelled
            await made.close()
            raise
        if machine == _NO_MACHINE and greeting.flags & GreetingFlags.FRESH:
            made.machine = machine = greeting.machine
        if greeting.format != FORMAT or greeting.machine != machine:
            await made.close()
            raise UserError(
                f"the emulator at {address} waits for machine {greeting.machine}, format {greeting.format}; this is "
                f"machine {machine}, format {FORMAT}"
            )
        return made

    async def deliver(self, frame: bytes) -> None:
        """Send a frame; return when the target has accepted it, or when it is flushed to its file.

        Raises :class:`~vmbus.saving.StateRefused`.
        """
        if self._reader is None or self._writer is None:
            await asyncio.to_thread(self._store, frame)
            return
        try:
            async with asyncio.timeout(_TIMEOUT):
                self._writer.write(frame)
                await self._writer.drain()
                start = await self._reader.readexactly(VERDICT_HEADER_SIZE)
                verdict = VERDICT.parse(
                    start + await self._reader.readexactly(int.from_bytes(start[6:8], "little"))
                )
        except (OSError, EOFError, TimeoutError, MalformedError) as error:
            raise StateRefused(
                Reason.NOT_ACCEPTED, f"the target did not confirm that it has the state: {error!r}"
            ) from error
        if not verdict.accepted:
            raise StateRefused(Reason.NOT_ACCEPTED, verdict.reason.decode(errors="replace"))

    def _store(self, frame: bytes) -> None:
        path = self.address.path
        unfinished = path.with_name(f"{path.name}.{secrets.token_hex(8)}.part")
        try:
            # Neither a file nor a link that somebody else put there is written to.
            descriptor = os.open(
                unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600
            )
        except OSError as error:
            raise StateRefused(Reason.NOT_ACCEPTED, f"cannot write {path}: {error.strerror}") from error
        try:
            with open(descriptor, "wb") as file:  # noqa: PTH123 - of a descriptor
                file.write(frame)
                file.flush()
                os.fsync(file.fileno())
            durable.replace(unfinished, path)
        except OSError as error:
            unfinished.unlink(missing_ok=True)
            raise StateRefused(Reason.NOT_ACCEPTED, f"cannot write {path}: {error.strerror}") from error

    async def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            with contextlib.suppress(OSError):
                await self._writer.wait_closed()


def read_state(path: Path) -> bytes:
    """Return the bytes of a state's file, which nobody else can have written.

    Raises ``OSError``, and :class:`~vmbus.saving.StateRefused` for a file of another user, one that others can
    write, one that is not a regular file, and one that is too large.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(descriptor, "rb") as file:  # noqa: PTH123 - of a descriptor
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            raise StateRefused(Reason.NOT_ACCEPTED, f"{path} is not a regular file")
        if not _ours(found.st_uid) or found.st_mode & 0o022:
            raise StateRefused(
                Reason.NOT_ACCEPTED,
                f"{path} belongs to user {found.st_uid} and has mode {stat.S_IMODE(found.st_mode):o}: only a file "
                "that nobody but you can write is read",
            )
        data = file.read(_MAX_FRAME + 1)
    if len(data) > _MAX_FRAME:
        raise StateRefused(Reason.NOT_ACCEPTED, f"{path} has more than {_MAX_FRAME} bytes")
    return data


def _remove_socket(path: Path) -> None:
    """Remove the socket that an emulator left at ``path``. Raises ``OSError`` for anything else there."""
    try:
        found = path.lstat()
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(found.st_mode):
        raise FileExistsError(errno.EEXIST, "it exists, and is not a socket")
    path.unlink()


class IncomingCarrier:
    """The target's end. Made by :meth:`listen`."""

    def __init__(self, address: CarrierAddress, machine: UUID, check: Callable[[bytes], None]) -> None:
        self.address = address
        self._machine = machine
        self._check = check
        self._server: asyncio.Server | None = None
        self._connections: set[asyncio.Task[None]] = set()
        self._frame: Frame | None = None

    @classmethod
    async def listen(
        cls, address: CarrierAddress, machine: UUID, check: Callable[[bytes], None]
    ) -> IncomingCarrier:
        """Listen at ``address``. Raises :class:`~vmbus.errors.UserError`.

        ``check`` raises :class:`~vmbus.errors.VmbusError` for a state that cannot be restored here.
        """
        made = cls(address, machine, check)
        if address.kind == "unix":
            try:
                _remove_socket(address.path)
                made._server = await asyncio.start_unix_server(made._begin, str(address.path))
                address.path.chmod(0o600)
            except OSError as error:
                await made.close()
                raise UserError(f"cannot listen at {address}: {error.strerror or error}") from error
        return made

    async def close(self) -> None:
        """Stop listening, and end the connections: a source learns that nobody receives its state."""
        if self._server is not None:
            self._server.close()
            self._server = None
            self.address.path.unlink(missing_ok=True)
        connections = tuple(self._connections)
        for each in connections:
            each.cancel()
        await asyncio.gather(*connections, return_exceptions=True)

    def _begin(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.ensure_future(self._connected(reader, writer))
        self._connections.add(task)
        task.add_done_callback(self._connections.discard)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        machine, flags = self._machine, 0
        if machine == _NO_MACHINE:
            machine, flags = uuid4(), int(GreetingFlags.FRESH)
        try:
            _check_peer(writer)
            self._frame = None  # the state of a migration before, which did not end here, is not this one's
            writer.write(GREETING.build(Greeting(FORMAT, machine, flags)))
            start = await reader.readexactly(FRAME_HEADER.size)  # when the source's guest is stopped
            async with asyncio.timeout(_TIMEOUT):
                try:
                    rest = await reader.readexactly(frame_size(start) - len(start))
                    self._frame = self._sound(start + rest, machine)
                except (VmbusError, EOFError) as error:
                    _logger.error("a state was refused: %s", error)
                    verdict = Verdict(0, str(error).encode(errors="backslashreplace")[:1000])
                else:
                    verdict = Verdict(1, b"")
                writer.write(VERDICT.build(verdict))
                await writer.drain()
        except PermissionError as error:
            _logger.warning("no state is accepted over %s: %s", self.address, error)
        except (OSError, EOFError, TimeoutError) as error:
            _logger.info("a source closed the side channel: %r", error)
        finally:
            writer.close()

    def _sound(self, data: bytes, machine: UUID) -> Frame:
        frame = parse_frame(data)
        if frame.machine != machine:
            raise StateRefused(
                Reason.NOT_ACCEPTED,
                f"the state belongs to machine {frame.machine}, this is machine {machine}",
            )
        self._check(frame.state)
        return frame

    def frame(self, digest: bytes | None = None) -> Frame:
        """Return the frame that has arrived; with ``digest``, only the frame with that digest.

        Raises :class:`~vmbus.errors.VmbusError`.
        """
        found = self._frame
        if self.address.kind == "file":
            try:
                found = self._sound(read_state(self.address.path), self._machine)
            except OSError as error:
                raise StateRefused(
                    Reason.NOT_THERE, f"cannot read the state at {self.address}: {error.strerror}"
                ) from error
        if found is None:
            raise StateRefused(Reason.NOT_THERE, f"no state has arrived over {self.address}")
        if digest is not None and found.digest != digest:
            raise StateRefused(
                Reason.FOREIGN_SAVE, f"the state that came over {self.address} belongs to another migration"
            )
        return found


class SideChannel:
    """Both ends of one guest's side channel."""

    def __init__(self, qmp: Monitor) -> None:
        self._qmp = qmp
        self._outgoing: OutgoingCarrier | None = None
        self._incoming: IncomingCarrier | None = None
        self.reference: bytes | None = None
        """What QEMU's stream has in place of the state that was delivered last."""

    @property
    def used(self) -> bool:
        """Whether the side channel carries the state of the migration under way."""
        return self._outgoing is not None

    @contextlib.asynccontextmanager
    async def carrying(self, address: CarrierAddress) -> AsyncIterator[None]:
        """Carry states to ``address`` in the meantime. Raises :class:`~vmbus.errors.UserError` before that."""
        self._outgoing = await OutgoingCarrier.open(address, await self._machine())
        try:
            yield
        finally:
            outgoing, self._outgoing = self._outgoing, None
            await outgoing.close()

    async def deliver(self, state: bytes, *, ran: bool) -> None:
        """Deliver ``state``; return when the target has it. Raises :class:`~vmbus.saving.StateRefused`."""
        if self._outgoing is None:
            raise StateRefused(Reason.WRONG_STATE, "the migration that this state was for has ended")
        frame = build_frame(
            machine=self._outgoing.machine,
            migration=uuid4(),
            ran=ran,
            writer=f"vmbus-emulator {__version__}",
            state=state,
        )
        self.reference = REFERENCE.build(Reference(frame[-DIGEST_SIZE:]))
        await self._outgoing.deliver(frame)

    async def listen(self, address: CarrierAddress, check: Callable[[bytes], None]) -> None:
        """Listen for a state: see :meth:`IncomingCarrier.listen`."""
        self._incoming = await IncomingCarrier.listen(address, await self._machine(), check)

    def frame(self, digest: bytes | None = None) -> Frame:
        """Return the frame that has arrived: see :meth:`IncomingCarrier.frame`."""
        if self._incoming is None:
            raise StateRefused(
                Reason.NOT_THERE, "the state comes over a side channel: start this side with --carrier"
            )
        return self._incoming.frame(digest)

    async def close(self) -> None:
        """Stop listening."""
        if self._incoming is not None:
            await self._incoming.close()

    async def _machine(self) -> UUID:
        """Return the machine's UUID; all zeros if QEMU was started without ``-uuid``."""
        return UUID((await self._qmp.execute("query-uuid"))["UUID"])
