"""Steps of a switch-over that depend on the client of the monitor."""

from __future__ import annotations

import asyncio
import json
import socket
from pathlib import Path

from vmbus.machine.migration.switchover import TURNS_OF_CLIENT
from vmbus.machine.qemu.qmp import Qmp

GREETING = {
    "QMP": {"version": {"qemu": {"micro": 0, "minor": 1, "major": 11}, "package": ""}, "capabilities": []}
}


def greet(server: socket.socket) -> socket.socket:
    """Be the server of a monitor until its client may send commands."""
    connection, _ = server.accept()
    connection.sendall(json.dumps(GREETING).encode() + b"\r\n")
    asked = json.loads(connection.recv(4096))
    connection.sendall(
        json.dumps({"return": {}, **({"id": asked["id"]} if "id" in asked else {})}).encode() + b"\r\n"
    )
    return connection


async def test_both_commands_are_on_their_way_before_the_state_is_written(tmp_path: Path) -> None:
    path = tmp_path / "qmp.sock"
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))
        server.listen()
        connecting = asyncio.ensure_future(Qmp.connect(str(path)))
        connection = await asyncio.to_thread(greet, server)
        qmp = await connecting
        with connection:
            commands = [
                asyncio.ensure_future(qmp.execute(each)) for each in ("query-migrate", "migrate-continue")
            ]
            for _ in range(TURNS_OF_CLIENT):
                await asyncio.sleep(0)
            connection.setblocking(False)
            received = connection.recv(4096)
            assert received.index(b'"query-migrate"') < received.index(b'"migrate-continue"')
            for each in commands:
                each.cancel()
            await asyncio.gather(*commands, return_exceptions=True)
        await qmp.close()
