"""A QMP connection that another process goes on with: no event is lost, none comes twice, and none is cut in two."""

from __future__ import annotations

import asyncio
import json
import os
import socket
from collections.abc import AsyncIterator

import pytest
from vmbus.errors import QemuGone
from vmbus.machine.qemu.qmp import Qmp

GREETING = {
    "QMP": {"version": {"qemu": {"micro": 0, "minor": 1, "major": 11}, "package": ""}, "capabilities": []}
}


class Server:
    """QEMU's end."""

    def __init__(self, path: str) -> None:
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(path)
        self.listener.listen()
        self.connection = self.listener
        self.stream = b""

    async def answer_greeting(self) -> None:
        loop = asyncio.get_running_loop()
        self.listener.setblocking(False)
        self.connection, _ = await loop.sock_accept(self.listener)
        self.connection.setblocking(False)
        self.write(GREETING)
        await self.command("qmp_capabilities")

    def write(self, *messages: object, cut: int = 0) -> bytes:
        """Write messages; ``cut``: without so many of the last bytes, which are returned."""
        data = b"".join(json.dumps(each).encode() + b"\n" for each in messages)
        self.connection.sendall(data[: len(data) - cut])
        return data[len(data) - cut :]

    async def command(self, name: str) -> None:
        """Read a command and answer it."""
        loop = asyncio.get_running_loop()
        while not self.stream.endswith(b"}"):  # commands end without a line feed; one is sent at a time
            self.stream += await loop.sock_recv(self.connection, 65536)
        message, self.stream = json.loads(self.stream), b""
        assert message["execute"] == name
        self.write({"return": {"by": name}, **({"id": message["id"]} if "id" in message else {})})


@pytest.fixture
async def server(tmp_path: object) -> AsyncIterator[Server]:
    found = Server(f"{tmp_path}/qmp.sock")
    yield found
    found.connection.close()
    found.listener.close()


class Follower:
    """Who handles the events of a connection."""

    def __init__(self, qmp: Qmp) -> None:
        self.names: list[str] = []
        self.task = asyncio.ensure_future(self._follow(qmp))

    async def _follow(self, qmp: Qmp) -> None:
        async for name, _ in qmp.events():
            self.names.append(name)

    async def has(self, count: int) -> None:
        async with asyncio.timeout(30):
            while len(self.names) < count:  # noqa: ASYNC110 - the follower has no event
                await asyncio.sleep(0.001)


def event(number: int) -> dict[str, object]:
    return {"event": f"E{number}", "timestamp": {"seconds": 1, "microseconds": 0}}


async def connected(server: Server, tmp_path: object) -> Qmp:
    connecting = asyncio.ensure_future(Qmp.connect(f"{tmp_path}/qmp.sock"))
    await server.answer_greeting()
    return await connecting


async def asked(qmp: Qmp, server: Server, name: str) -> object:
    asking = asyncio.ensure_future(qmp.execute(name))
    await server.command(name)
    return await asking


@pytest.mark.parametrize("cut", [0, 1, 20, 60])
async def test_another_process_goes_on_at_the_byte(server: Server, tmp_path: object, cut: int) -> None:
    qmp = await connected(server, tmp_path)
    here = Follower(qmp)
    rest = server.write(*map(event, range(5)), cut=cut)
    await here.has(5 if cut == 0 else 4)
    unread = await qmp.pause()
    assert here.names == [f"E{number}" for number in range(len(here.names))]
    server.connection.sendall(rest)
    server.write(event(5))

    other = Qmp.adopt(os.dup(qmp.fileno()), unread, qmp.path, qmp.pid)
    await qmp.close()
    await here.task
    await other.begin()
    there = Follower(other)
    assert await asked(other, server, "query-status") == {"by": "query-status"}
    await there.has(6 - len(here.names))
    assert here.names + there.names == [f"E{number}" for number in range(6)]
    await other.close()
    await there.task


async def test_all_that_was_read_is_handled_before_the_pause_ends(server: Server, tmp_path: object) -> None:
    """However the events arrive: what the process that leaves has read is not read again."""
    qmp = await connected(server, tmp_path)
    here = Follower(qmp)
    for number in range(200):
        server.write(event(number))
    await here.has(1)
    unread = await qmp.pause()
    before = len(here.names)
    server.write(event(200))
    other = Qmp.adopt(os.dup(qmp.fileno()), unread, qmp.path, qmp.pid)
    await other.begin()
    there = Follower(other)
    await there.has(201 - before)
    assert len(here.names) == before
    assert here.names + there.names == [f"E{number}" for number in range(201)]
    await qmp.close()
    await other.close()
    await asyncio.gather(here.task, there.task)


async def test_a_connection_that_is_not_handed_over_goes_on_here(server: Server, tmp_path: object) -> None:
    qmp = await connected(server, tmp_path)
    here = Follower(qmp)
    rest = server.write(event(0), event(1), cut=10)
    await here.has(1)
    await qmp.pause()
    server.connection.sendall(rest)
    assert here.names == ["E0"]
    qmp.resume()
    await here.has(2)
    assert await asked(qmp, server, "query-status") == {"by": "query-status"}
    await qmp.close()
    await here.task


async def test_an_adopted_connection_that_is_never_used_is_closed(server: Server, tmp_path: object) -> None:
    qmp = await connected(server, tmp_path)
    here = Follower(qmp)
    other = Qmp.adopt(os.dup(qmp.fileno()), await qmp.pause(), qmp.path, qmp.pid)
    await other.close()
    qmp.resume()
    server.write(event(0))
    await here.has(1)
    await qmp.close()
    await here.task


async def test_the_end_of_qemu_is_said(server: Server, tmp_path: object) -> None:
    qmp = await connected(server, tmp_path)
    here = Follower(qmp)
    server.connection.close()
    await here.task
    with pytest.raises(QemuGone):
        await qmp.pause()
    await qmp.close()
