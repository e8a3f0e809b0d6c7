"""The carrier of the state in QEMU's stream: ``dbus-vmstate``, and the emulator as its helper.

Source: docs/protocol/migration.md#dbus-vmstate.

QEMU's object ``dbus-vmstate`` is a client of a D-Bus daemon, private to the guest. When QEMU saves a machine, it
requests the state of every owner of the name ``org.qemu.VMState1`` and puts it into its stream; when it loads a
machine, it returns the state. So the state is part of every migration, snapshot or file.

    QEMU  ── Save() ──→  answer = state      (after guest memory; QEMU's main loop is blocked)
    QEMU  ── Load(state) ──→  answer, or an error: then the load fails

Both are answered from what was prepared before: a command for QEMU in there would wait until the timeout of 25
seconds. The connection has a thread of its own, which asks the emulator's event loop for the answer. That loop may be
waiting for QEMU's main loop (:class:`~vmbus.machine.qemu.qtest.MainLoopWaits`): then nothing is prepared, and the
thread refuses for it. So an answer never waits for QEMU.

QEMU only logs an error that Save() returns; :mod:`~vmbus.machine.migration.state_machine` has how a refusal reaches
the target.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import subprocess
import threading
from collections.abc import Coroutine, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar
from xml.sax.saxutils import escape

from dbus_fast import Message, MessageType, NameFlag, Variant
from dbus_fast.aio import MessageBus
from dbus_fast.errors import DBusError

from vmbus.errors import MissingRequirement, QemuUnsuitable, VmbusError
from vmbus.machine.qemu import confined
from vmbus.machine.qemu.child import in_child
from vmbus.machine.qemu.qtest import MainLoopWaits

_logger = logging.getLogger(__name__)

HELPER_ID = "vmbus-emulator"
"""Id of the emulator's state; in ``id-list`` of the ``dbus-vmstate`` object."""

_INTERFACE = "org.qemu.VMState1"
_PATH = "/org/qemu/VMState1"
_PROPERTIES = "org.freedesktop.DBus.Properties"
_FAILED = "org.qemu.VMState1.Error.Failed"
_BEHIND = "QEMU replaced guest memory without the emulator; use `vmbus snapshot load`"

_CONFIGURATION = """<!DOCTYPE busconfig PUBLIC "-//freedesktop//DTD D-Bus Bus Configuration 1.0//EN"
 "http://www.freedesktop.org/standards/dbus/1.0/busconfig.dtd">
<busconfig>
  <listen>unix:path={path}</listen>
  <auth>EXTERNAL</auth>
  <policy context="default">
    <allow user="*"/>
    <allow own="*"/>
    <allow send_destination="*" eavesdrop="false"/>
    <allow receive_sender="*"/>
  </policy>
</busconfig>
"""


class DbusDaemon:
    """A ``dbus-daemon`` of one guest, for this user only. Made by :meth:`start`."""

    def __init__(self, process: subprocess.Popen[bytes], socket: Path, configuration: Path) -> None:
        self.process = process
        self.socket = socket
        self._configuration = configuration

    @classmethod
    async def start(cls, command: Sequence[str], directory: Path, timeout: float = 10.0) -> DbusDaemon:
        """Start ``command`` (the argv prefix of a ``dbus-daemon``) with its socket in ``directory``.

        Raises :class:`~vmbus.errors.MissingRequirement` when it is not ready within ``timeout`` seconds.
        """
        socket = directory / "dbus.sock"
        configuration = directory / "dbus.conf"
        configuration.write_text(configure_daemon(socket))
        log = directory / "dbus.log"
        limits = confined.dbus_daemon(command, directory)
        with log.open("wb") as output, in_child(limits) as prepare:
            process = subprocess.Popen(  # noqa: ASYNC220 - takes no time, and the child checks its parent
                [*command, f"--config-file={configuration}", "--nofork", "--nopidfile", "--nosyslog"],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                preexec_fn=prepare,
            )
        daemon = cls(process, socket, configuration)
        end = asyncio.get_running_loop().time() + timeout
        try:
            while not socket.exists():
                if process.poll() is not None or asyncio.get_running_loop().time() > end:
                    raise MissingRequirement(
                        f"{command[-1]} did not start: {log.read_text(errors='replace').strip() or 'no message'}"
                    )
                await asyncio.sleep(0.005)
        except BaseException:
            daemon.stop()
            raise
        socket.chmod(0o600)
        return daemon

    @property
    def address(self) -> str:
        """The D-Bus address, for QEMU's ``addr=`` and for :meth:`VmStateHelper.connect`."""
        return dbus_address(self.socket)

    def stop(self) -> None:
        """End the daemon and remove its files."""
        if self.process.poll() is None:
            self.process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(2)
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        self.socket.unlink(missing_ok=True)
        self._configuration.unlink(missing_ok=True)


def configure_daemon(socket: Path) -> str:
    """Return the configuration file of a daemon that listens on ``socket`` and carries states."""
    return _CONFIGURATION.format(path=escape(_dbus_escape(socket)))


def _dbus_escape(path: Path) -> str:
    """Return a path for a D-Bus address: everything but a few characters as ``%xx``."""
    plain = b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-/.\\*"
    return "".join(chr(byte) if byte in plain else f"%{byte:02x}" for byte in str(path).encode())


def dbus_address(socket: Path) -> str:
    """Return the D-Bus address of a daemon that listens on ``socket``."""
    return f"unix:path={_dbus_escape(socket)}"


class StateKeeper(Protocol):
    """The owner of the state. Its methods are called by the event loop in which the helper was connected."""

    async def save(self) -> bytes:
        """Return the state, which was prepared before. Raises :class:`~vmbus.errors.VmbusError` if there is none."""

    def load(self, state: bytes) -> None:
        """Restore a state. Raises :class:`~vmbus.errors.VmbusError` to refuse it."""

    @property
    def save_refusal(self) -> bytes:
        """The answer in place of a state while the event loop waits for QEMU; read by the helper's thread."""

    def save_was_refused(self) -> None:
        """Note that this answer was given."""


Answer = TypeVar("Answer")


class VmStateHelper:
    """The emulator as a helper of ``dbus-vmstate``, in a thread of its own. Made by :meth:`connect`."""

    def __init__(self, address: str, keeper: StateKeeper, waits: MainLoopWaits) -> None:
        self._address = address
        self._bus: MessageBus | None = None
        self._joined = False
        self._keeper = keeper
        self._waits = waits
        self._tasks: set[asyncio.Task[None]] = set()
        self._keepers_loop = asyncio.get_running_loop()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="vmbus-dbus", daemon=True)
        self._thread.start()

    @classmethod
    async def connect(cls, address: str, keeper: StateKeeper, waits: MainLoopWaits) -> VmStateHelper:
        """Connect to the daemon at ``address`` and own the name that QEMU looks for.

        ``waits``: of the event loop that calls this. Raises :class:`~vmbus.errors.QemuUnsuitable` when no daemon
        answers there.
        """
        helper = cls(address, keeper, waits)
        try:
            await helper._in_thread(helper._connect())
        except BaseException as error:
            await helper.close()
            if not isinstance(error, (OSError, DBusError, EOFError)):
                raise  # cancelled, mostly
            raise QemuUnsuitable(
                f"no D-Bus daemon answers at {address} ({error}), which QEMU's dbus-vmstate object names: "
                "without it the guest cannot be migrated. Start it before QEMU; "
                "`vmbus qemu-args --migratable` says how"
            ) from error
        return helper

    async def close(self) -> None:
        """Disconnect and end the thread; safe to call twice."""
        if self._loop.is_closed():
            return
        await self._in_thread(self._disconnect())
        self._loop.call_soon_threadsafe(self._loop.stop)
        await asyncio.to_thread(self._thread.join)
        self._loop.close()

    async def _in_thread(self, work: Coroutine[Any, Any, Answer]) -> Answer:
        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(work, self._loop))

    # --- in the thread ---

    async def _connect(self) -> None:
        bus = self._bus = MessageBus(bus_address=self._address)
        await bus.connect()
        bus.add_message_handler(self._message)
        # Queued behind other helpers: QEMU calls all owners. An emulator that was detached owns it no more.
        await bus.request_name(_INTERFACE, NameFlag.ALLOW_REPLACEMENT)
        self._joined = True

    async def _disconnect(self) -> None:
        bus = self._bus
        if bus is not None:
            connected = bus.connected
            bus.disconnect()
            if connected and self._joined:  # of a connection given up half made, the end is never reported
                with contextlib.suppress(OSError, EOFError):
                    await bus.wait_for_disconnect()  # type: ignore[no-untyped-call]
        for task in tuple(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _ask(self, work: Coroutine[Any, Any, Answer]) -> asyncio.Future[Answer]:
        """Have the keeper's event loop do ``work``."""
        return asyncio.wrap_future(asyncio.run_coroutine_threadsafe(work, self._keepers_loop))

    async def _answered(self, answer: asyncio.Future[Any]) -> bool:
        """Wait for an answer of the keeper's event loop; return False if that loop waits for QEMU instead."""
        waits = asyncio.Event()

        def begins() -> None:
            with contextlib.suppress(RuntimeError):  # the thread has ended
                self._loop.call_soon_threadsafe(waits.set)

        with self._waits.watched(begins):
            waiting = asyncio.ensure_future(waits.wait())
            both: set[asyncio.Future[Any]] = {answer, waiting}
            try:
                await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
            finally:
                waiting.cancel()
        return answer.done()

    async def _save(self) -> bytes:
        answer = self._ask(self._keeper.save())
        if await self._answered(answer):
            return answer.result()
        answer.cancel()
        # Whatever the event loop answers meanwhile: it hears afterwards that QEMU did not get it.
        self._keepers_loop.call_soon_threadsafe(self._keeper.save_was_refused)
        return self._keeper.save_refusal

    async def _load(self, state: bytes) -> None:
        decided = threading.Lock()  # of two threads, who takes it first

        async def load() -> None:
            if decided.acquire(blocking=False):
                self._keeper.load(state)

        answer = self._ask(load())
        if not await self._answered(answer) and decided.acquire(blocking=False):
            answer.cancel()
            raise VmbusError(_BEHIND)
        await answer

    def _message(self, message: Message) -> Message | bool | None:
        if message.message_type is not MessageType.METHOD_CALL or message.path != _PATH:
            return None
        if message.interface == _PROPERTIES:
            return self._property(message)
        if message.interface != _INTERFACE:
            return None
        if (message.member, message.signature) not in (("Save", ""), ("Load", "ay")):
            return None
        task = asyncio.ensure_future(self._answer(message))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return True

    async def _answer(self, message: Message) -> None:
        try:
            if message.member == "Save":
                answer = Message.new_method_return(message, "ay", [await self._save()])
            else:
                await self._load(bytes(message.body[0]))
                answer = Message.new_method_return(message)
        except VmbusError as error:
            _logger.error("%s: %s", message.member, error)
            answer = Message.new_error(message, _FAILED, str(error))
        except Exception as error:
            _logger.exception("%s failed", message.member)
            answer = Message.new_error(message, _FAILED, f"internal error: {error!r}")
        if self._bus is not None and self._bus.connected:
            await self._bus.send(answer)

    def _property(self, message: Message) -> Message | None:
        wanted: list[Any] = list(message.body)
        if not wanted or wanted[0] != _INTERFACE:
            return None
        properties: Mapping[str, Variant] = {"Id": Variant("s", HELPER_ID)}
        if message.member == "GetAll":
            return Message.new_method_return(message, "a{sv}", [properties])
        if message.member == "Get" and wanted[1:] == ["Id"]:
            return Message.new_method_return(message, "v", [properties["Id"]])
        return None
