"""The carrier of the state in QEMU's stream: ``dbus-vmstate``, and the emulator as its helper.

Source: docs/protocol/migration.md#dbus-vmstate.

QEMU's object ``dbus-vmstate`` is a client of a D-Bus daemon, private to the guest. When QEMU saves a machine, it
requests the state of every owner of the name ``org.qemu.VMState1`` and puts it into its stream; when it loads a
machine, it returns the state. So the state is part of every migration, snapshot or file.

    QEMU  ── Save() ──→  answer = state      (after guest memory; QEMU's main loop is blocked)
    QEMU  ── Load(state) ──→  answer, or an error: then the load fails

Both are answered from what was prepared before: a command for QEMU in there would wait until the timeout of 25
seconds. QEMU only logs an error that Save() returns; :mod:`~vmbus.machine.migration.state_machine` has how a refusal
reaches the target.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol
from xml.sax.saxutils import escape

from dbus_fast import Message, MessageType, NameFlag, Variant
from dbus_fast.aio import MessageBus
from dbus_fast.errors import DBusError

from vmbus.errors import MissingRequirement, QemuUnsuitable, VmbusError
from vmbus.machine.qemu import confined
from vmbus.machine.qemu.child import in_child

_logger = logging.getLogger(__name__)

HELPER_ID = "vmbus-emulator"
"""Id of the emulator's state; in ``id-list`` of the ``dbus-vmstate`` object."""

_INTERFACE = "org.qemu.VMState1"
_PATH = "/org/qemu/VMState1"
_PROPERTIES = "org.freedesktop.DBus.Properties"
_FAILED = "org.qemu.VMState1.Error.Failed"

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
                start_new_session=True,
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
    """The owner of the state."""

    async def save(self) -> bytes:
        """Return the state, which was prepared before. Raises :class:`~vmbus.errors.VmbusError` if there is none."""

    def load(self, state: bytes) -> None:
        """Restore a state. Raises :class:`~vmbus.errors.VmbusError` to refuse it."""


class VmStateHelper:
    """The emulator as a helper of ``dbus-vmstate``. Made by :meth:`connect`."""

    def __init__(self, bus: MessageBus, keeper: StateKeeper) -> None:
        self._bus = bus
        self._keeper = keeper
        self._tasks: set[asyncio.Task[None]] = set()
        bus.add_message_handler(self._message)

    @classmethod
    async def connect(cls, address: str, keeper: StateKeeper) -> VmStateHelper:
        """Connect to the daemon at ``address`` and own the name that QEMU looks for.

        Raises :class:`~vmbus.errors.QemuUnsuitable` when no daemon answers there.
        """
        bus = MessageBus(bus_address=address)
        try:
            await bus.connect()
            helper = cls(bus, keeper)
            # Queued behind other helpers: QEMU calls all owners. An emulator that was detached owns it no more.
            await bus.request_name(_INTERFACE, NameFlag.ALLOW_REPLACEMENT)
        except (OSError, DBusError, EOFError) as error:
            bus.disconnect()
            raise QemuUnsuitable(
                f"no D-Bus daemon answers at {address} ({error}), which QEMU's dbus-vmstate object names: "
                "without it the guest cannot be migrated. Start it before QEMU; "
                "`vmbus qemu-args --migratable` says how"
            ) from error
        return helper

    async def close(self) -> None:
        """Disconnect; safe to call twice."""
        if self._bus.connected:
            self._bus.disconnect()
            with contextlib.suppress(OSError, EOFError):
                await self._bus.wait_for_disconnect()  # type: ignore[no-untyped-call]

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
                answer = Message.new_method_return(message, "ay", [await self._keeper.save()])
            else:
                self._keeper.load(bytes(message.body[0]))
                answer = Message.new_method_return(message)
        except VmbusError as error:
            _logger.error("%s: %s", message.member, error)
            answer = Message.new_error(message, _FAILED, str(error))
        except Exception as error:
            _logger.exception("%s failed", message.member)
            answer = Message.new_error(message, _FAILED, f"internal error: {error!r}")
        if self._bus.connected:
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
