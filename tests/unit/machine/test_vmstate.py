"""The private D-Bus daemon, and the emulator as QEMU meets it there."""

from __future__ import annotations

import asyncio
import shutil
import socket
import stat
import threading
from pathlib import Path
from typing import Any

import pytest
from dbus_fast import Message, MessageType
from dbus_fast.aio import MessageBus
from vmbus.errors import MissingRequirement, QemuUnsuitable, VmbusError
from vmbus.machine.migration.vmstate import HELPER_ID, DbusDaemon, VmStateHelper, dbus_address
from vmbus.machine.qemu.qtest import MainLoopWaits, Qtest

DAEMON = shutil.which("dbus-daemon")
needs_daemon = pytest.mark.skipif(DAEMON is None, reason="dbus-daemon is not installed")


class Keeper:
    def __init__(self) -> None:
        self.loaded: list[bytes] = []
        self.refused = 0

    async def save(self) -> bytes:
        return bytes(1 << 20)

    @property
    def save_refusal(self) -> bytes:
        return b"not now"

    def save_was_refused(self) -> None:
        self.refused += 1

    def load(self, state: bytes) -> None:
        if state == b"bad":
            raise VmbusError("this is no state")
        if state == b"worse":
            raise ZeroDivisionError
        self.loaded.append(state)


@needs_daemon
async def test_qemu_s_calls_are_answered_and_nothing_is_left_behind(tmp_path: Path) -> None:
    folder = tmp_path / "a, b=c"
    folder.mkdir()
    daemon = await DbusDaemon.start([str(DAEMON)], folder)
    assert stat.S_IMODE(daemon.socket.stat().st_mode) == 0o600
    keeper = Keeper()
    helper = await VmStateHelper.connect(daemon.address, keeper, MainLoopWaits())
    bus = await MessageBus(bus_address=daemon.address).connect()

    async def call(member: str, *, interface: str = "org.qemu.VMState1", **more: Any) -> Message:
        reply = await bus.call(
            Message(
                destination="org.qemu.VMState1",
                path="/org/qemu/VMState1",
                interface=interface,
                member=member,
                **more,
            )
        )
        assert reply is not None
        return reply

    properties = "org.freedesktop.DBus.Properties"
    found = await call("GetAll", interface=properties, signature="s", body=["org.qemu.VMState1"])
    assert found.body[0]["Id"].value == HELPER_ID
    assert len((await call("Save")).body[0]) == 1 << 20
    assert (await call("Load", signature="ay", body=[b"good"])).message_type is MessageType.METHOD_RETURN
    assert keeper.loaded == [b"good"]
    refused = await call("Load", signature="ay", body=[b"bad"])
    assert (refused.message_type, refused.body) == (MessageType.ERROR, ["this is no state"])
    assert (await call("Load", signature="ay", body=[b"worse"])).message_type is MessageType.ERROR
    assert (await call("Format")).message_type is MessageType.ERROR
    bus.disconnect()
    await helper.close()
    daemon.stop()
    assert [path.name for path in folder.iterdir()] == ["dbus.log"]


async def test_a_daemon_that_does_not_start_is_an_error_with_its_words(tmp_path: Path) -> None:
    with pytest.raises(MissingRequirement, match="did not start"):
        await DbusDaemon.start(["/bin/false"], tmp_path)


async def test_nobody_at_the_address_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(QemuUnsuitable, match="cannot be migrated"):
        await VmStateHelper.connect(dbus_address(tmp_path / "nobody.sock"), Keeper(), MainLoopWaits())


@needs_daemon
@pytest.mark.parametrize("member", ["Save", "Load"])
async def test_qemu_is_answered_while_the_event_loop_waits_for_its_main_loop(
    tmp_path: Path, member: str
) -> None:
    """QEMU's main loop calls Save(), and executes what came over the qtest socket when it has the answer."""
    daemon = await DbusDaemon.start([str(DAEMON)], tmp_path)
    here, there = socket.socketpair()
    qtest, keeper = Qtest(here, timeout=20), Keeper()
    helper = await VmStateHelper.connect(daemon.address, keeper, qtest.waits)
    signature, body = ("", []) if member == "Save" else ("ay", [b"good"])
    answers: list[Message | None] = []

    async def call() -> None:
        bus = await MessageBus(bus_address=daemon.address).connect()
        called = Message(
            destination="org.qemu.VMState1",
            path="/org/qemu/VMState1",
            interface="org.qemu.VMState1",
            member=member,
            signature=signature,
            body=body,
        )
        answers.append(await asyncio.wait_for(bus.call(called), 10))
        bus.disconnect()

    def main_loop() -> None:
        there.recv(1, socket.MSG_PEEK)  # the event loop waits already
        asyncio.run(call())
        there.sendall(b"OK\n")

    qemu = threading.Thread(target=main_loop, daemon=True)
    qemu.start()
    qtest.write_memory(4096, b"code")
    await asyncio.to_thread(qemu.join)
    await asyncio.sleep(0)
    answer = answers[0]
    assert answer is not None
    if member == "Save":
        assert (bytes(answer.body[0]), keeper.refused) == (b"not now", 1)
    else:
        assert (answer.message_type, keeper.loaded) == (MessageType.ERROR, [])
        assert "without the emulator" in answer.body[0]
    await helper.close()
    qtest.close()
    there.close()
    daemon.stop()


async def test_a_helper_that_is_cancelled_while_it_connects_leaves_no_thread(tmp_path: Path) -> None:
    """A daemon that accepts, and says nothing."""
    path = tmp_path / "dbus.sock"
    there = asyncio.Event()
    closed = asyncio.Event()

    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there.set()
        while await reader.read(4096):
            pass
        writer.close()
        closed.set()

    before = set(threading.enumerate())
    async with await asyncio.start_unix_server(silent, str(path)):
        connecting = asyncio.ensure_future(
            VmStateHelper.connect(dbus_address(path), Keeper(), MainLoopWaits())
        )
        await there.wait()
        connecting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await connecting
        assert [each.name for each in set(threading.enumerate()) - before if "dbus" in each.name] == []
        async with asyncio.timeout(20):
            await closed.wait()
