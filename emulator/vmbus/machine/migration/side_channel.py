"""The side channel: a Unix socket or a file between two emulators, for a state that QEMU's stream cannot carry.

That is the case without ``dbus-vmstate``, and for a state of more than its 1 MiB. Layouts are in
:mod:`vmbus.wire.frame`.

    unix:PATH   the target listens; the source connects before it migrates, and sends ``migrate-continue`` when the
                target has checked the state and accepted it
    file:PATH   the source writes and flushes all of it before it sends ``migrate-continue``; the target reads it
                when memory has arrived. A refusal comes late: the source stays paused, and can be taken back

With ``dbus-vmstate``, QEMU's stream refers to the frame by its digest, and ``Load()`` refuses any other frame.
Without it, the user is responsible for that; only the UUIDs of the machines are compared, if they have any.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from uuid import UUID, uuid4

from vmbus import __version__
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
    Reference,
    Verdict,
    build_frame,
    frame_size,
    parse_frame,
)

_logger = logging.getLogger(__name__)

_TIMEOUT = 20.0
"""Seconds for a greeting, or for a frame and its verdict; the guest is stopped in that time."""

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


class OutgoingCarrier:
    """The source's end. Made by :meth:`open`."""

    def __init__(self, address: CarrierAddress) -> None:
        self.address = address
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None

    @classmethod
    async def open(cls, address: CarrierAddress, machine: UUID) -> OutgoingCarrier:
        """Connect and check the target's greeting. Raises :class:`~vmbus.errors.UserError`: nothing has changed."""
        made = cls(address)
        if address.kind == "file":
            if not address.path.parent.is_dir():
                raise UserError(f"{address}: there is no directory {address.path.parent}")
            return made
        try:
            async with asyncio.timeout(_TIMEOUT):
                made._reader, made._writer = await asyncio.open_unix_connection(str(address.path))
                greeting = GREETING.parse(await made._reader.readexactly(GREETING.size))
        except (OSError, EOFError, TimeoutError, MalformedError) as error:
            await made.close()
            raise UserError(
                f"no emulator receives a state at {address} ({error}): start the target with --carrier {address}"
            ) from error
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
        unfinished = path.with_name(path.name + ".part")
        try:
            with unfinished.open("wb") as file:
                os.fchmod(file.fileno(), 0o600)
                file.write(frame)
                file.flush()
                os.fsync(file.fileno())
            unfinished.replace(path)
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
        except OSError as error:
            unfinished.unlink(missing_ok=True)
            raise StateRefused(Reason.NOT_ACCEPTED, f"cannot write {path}: {error.strerror}") from error

    async def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            with contextlib.suppress(OSError):
                await self._writer.wait_closed()


class IncomingCarrier:
    """The target's end. Made by :meth:`listen`."""

    def __init__(self, address: CarrierAddress, machine: UUID, check: Callable[[bytes], None]) -> None:
        self.address = address
        self._machine = machine
        self._check = check
        self._server: asyncio.Server | None = None
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
                address.path.unlink(missing_ok=True)
                made._server = await asyncio.start_unix_server(made._connected, str(address.path))
                address.path.chmod(0o600)
            except OSError as error:
                raise UserError(f"cannot listen at {address}: {error.strerror or error}") from error
        return made

    async def close(self) -> None:
        """Stop listening."""
        if self._server is not None:
            self._server.close()
            self._server = None
            self.address.path.unlink(missing_ok=True)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            writer.write(GREETING.build(Greeting(FORMAT, self._machine)))
            start = await reader.readexactly(FRAME_HEADER.size)  # when the source's guest is stopped
            async with asyncio.timeout(_TIMEOUT):
                try:
                    rest = await reader.readexactly(frame_size(start) - len(start))
                    self._frame = self._sound(start + rest)
                except (VmbusError, EOFError) as error:
                    _logger.error("a state was refused: %s", error)
                    verdict = Verdict(0, str(error).encode()[:1000])
                else:
                    verdict = Verdict(1, b"")
                writer.write(VERDICT.build(verdict))
                await writer.drain()
        except (OSError, EOFError, TimeoutError) as error:
            _logger.info("a source closed the side channel: %r", error)
        finally:
            writer.close()

    def _sound(self, data: bytes) -> Frame:
        frame = parse_frame(data)
        if frame.machine != self._machine:
            raise StateRefused(
                Reason.NOT_ACCEPTED,
                f"the state belongs to machine {frame.machine}, this is machine {self._machine}",
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
                found = self._sound(self.address.path.read_bytes())
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
            machine=await self._machine(),
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
