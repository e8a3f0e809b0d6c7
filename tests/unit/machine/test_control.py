"""The control socket: lines, descriptors that come along, and what a bad client costs."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from vmbus.errors import UserError
from vmbus.machine.control import ControlServer, ask


async def serve(
    tmp_path: Path, handlers: Mapping[str, Any], story: Callable[[Path], Awaitable[None]]
) -> None:
    path = tmp_path / "control.sock"
    server = ControlServer(path, handlers)
    await server.start()
    try:
        await story(path)
    finally:
        await server.stop()
    assert not path.exists()


async def echo(request: Mapping[str, Any]) -> object:
    return {key: value for key, value in request.items() if key != "descriptors"}


async def refuse(request: Mapping[str, Any]) -> object:
    raise UserError("not today")


async def test_requests_are_answered_in_their_order(tmp_path: Path) -> None:
    async def story(path: Path) -> None:
        reader, writer = await asyncio.open_unix_connection(str(path))
        writer.write(
            b'{"command": "echo", "n": 1}\n{"command": "refuse"}\n{"command": "x"}\nnonsense\n{"comm'
        )
        assert b'"n": 1' in await reader.readline()
        assert await reader.readline() == b'{"error": "not today"}\n'
        assert b"unknown command 'x'; known: echo, refuse" in await reader.readline()
        assert b"a request is a line such as" in await reader.readline()
        writer.write(b'and": "echo"}\n')
        assert await reader.readline() == b'{"return": {"command": "echo"}}\n'
        writer.close()

    await serve(tmp_path, {"echo": echo, "refuse": refuse}, story)


async def test_descriptors_come_with_a_request_and_are_closed_with_its_answer(tmp_path: Path) -> None:
    seen: list[int] = []

    async def write(request: Mapping[str, Any]) -> object:
        (number,) = request["descriptors"]
        assert not os.get_inheritable(number)
        os.write(number, b"written there")
        seen.append(number)
        return {}

    async def story(path: Path) -> None:
        reading, writing = os.pipe()
        await asyncio.to_thread(ask, path, "write", descriptors=[writing])
        os.close(writing)
        assert os.read(reading, 100) == b"written there"
        assert os.read(reading, 100) == b""  # nobody has the other end any more
        os.close(reading)
        with pytest.raises(OSError, match="Bad file"):
            os.fstat(seen[0])

    await serve(tmp_path, {"write": write}, story)


async def test_descriptors_are_not_taken_from_the_text_of_a_request(tmp_path: Path) -> None:
    async def count(request: Mapping[str, Any]) -> object:
        return len(request["descriptors"])

    async def story(path: Path) -> None:
        reader, writer = await asyncio.open_unix_connection(str(path))
        writer.write(b'{"command": "count", "descriptors": [0, 1, 2]}\n')
        assert await reader.readline() == b'{"return": 0}\n'
        writer.close()

    await serve(tmp_path, {"count": count}, story)


async def test_a_line_without_end_costs_its_connection_only(tmp_path: Path) -> None:
    async def story(path: Path) -> None:
        reader, writer = await asyncio.open_unix_connection(str(path))
        with pytest.raises(OSError):
            while True:
                writer.write(b"x" * (1 << 16))
                await writer.drain()
        assert await asyncio.to_thread(ask, path, "echo") == {"command": "echo"}
        del reader

    await serve(tmp_path, {"echo": echo}, story)


async def test_who_asks_hears_of_an_emulator_that_ends(tmp_path: Path) -> None:
    asked = asyncio.Event()

    async def wait(request: Mapping[str, Any]) -> object:
        asked.set()
        await asyncio.Event().wait()
        return None

    path = tmp_path / "control.sock"
    server = ControlServer(path, {"wait": wait})
    await server.start()
    asking = asyncio.ensure_future(asyncio.to_thread(ask, path, "wait"))
    await asked.wait()
    await server.stop()
    with pytest.raises(UserError, match="ended before it answered"):
        await asking


async def test_a_listener_is_not_blocked_by_who_says_nothing(tmp_path: Path) -> None:
    async def story(path: Path) -> None:
        with socket.socket(socket.AF_UNIX) as silent:
            silent.connect(str(path))
            assert await asyncio.to_thread(ask, path, "echo", n=2) == {"command": "echo", "n": 2}

    await serve(tmp_path, {"echo": echo}, story)


async def test_another_server_goes_on_with_the_same_socket_and_nobody_is_turned_away(tmp_path: Path) -> None:
    """Who connects while neither listens waits; the command that hands over is answered by the first one."""
    path = tmp_path / "control.sock"
    waiting: list[asyncio.Task[Any]] = []

    async def who(name: str) -> object:
        return name

    async def hand_over(request: Mapping[str, Any]) -> object:
        first.hold()
        listener = socket.socket(fileno=os.dup(first.fileno()))
        waiting.append(asyncio.ensure_future(asyncio.to_thread(ask, path, "who")))
        await asyncio.sleep(0)
        second = ControlServer(path, {"who": lambda request: who("second")}, listener)
        await second.start()
        first.leave()
        servers.append(second)
        return "done"

    first = ControlServer(path, {"who": lambda request: who("first"), "hand over": hand_over})
    servers = [first]
    await first.start()
    try:
        assert await asyncio.to_thread(ask, path, "who") == "first"
        idle = socket.socket(socket.AF_UNIX)
        idle.connect(str(path))
        assert await asyncio.to_thread(ask, path, "hand over") == "done"
        await first.answered()
        assert await waiting[0] == "second"
        assert await asyncio.to_thread(ask, path, "who") == "second"
        assert idle.recv(1) == b""  # it asked nothing, and nobody is left to answer
        idle.close()
        await first.stop()
        assert path.exists()
    finally:
        for server in servers[::-1]:
            await server.stop()
    assert not path.exists()


async def test_a_server_that_has_held_goes_on(tmp_path: Path) -> None:
    async def story(path: Path) -> None:
        server.hold()
        asking = asyncio.ensure_future(asyncio.to_thread(ask, path, "echo"))
        await asyncio.sleep(0)
        await server.start()
        assert await asking == {"command": "echo"}

    path = tmp_path / "control.sock"
    server = ControlServer(path, {"echo": echo})
    await server.start()
    try:
        await story(path)
    finally:
        await server.stop()
    assert not path.exists()
