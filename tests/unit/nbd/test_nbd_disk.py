"""A SCSI disk on an NBD server: commands become requests, the server's errors sense data."""

from __future__ import annotations

import errno
import os
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from vmbus.errors import UsageError, UserError
from vmbus_devices.scsi import Scsi
from vmbus_devices.scsi.drive import DriveOptions, open_drive

from tests.unit.nbd.nbd_server import (
    ALL,
    DISC,
    FLUSH_COMMAND,
    READ,
    TRIM_COMMAND,
    WRITE,
    ZEROES_COMMAND,
    Server,
)
from tests.unit.scsi.scsi_guest import ScsiGuest, controller

SIZE = 1 << 20
Listen = Callable[[Server], str]


@pytest.fixture
def listen(tmp_path: Path) -> Iterator[Listen]:
    """Serves at a Unix socket; gives the URI."""
    listening: list[socket.socket] = []

    def start(server: Server) -> str:
        path = tmp_path / "nbd.sock"
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        listener.bind(str(path))
        listener.listen()
        listening.append(listener)

        def accept() -> None:
            while True:
                try:
                    stream, _ = listener.accept()
                except OSError:
                    return
                server.serve_in_thread(stream)

        threading.Thread(target=accept, daemon=True).start()
        return f"nbd+unix:///{server.export}?socket={path}"

    yield start
    for listener in listening:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()


def connected_again(device: Scsi) -> None:
    """A start of the device replaces the connections; requests under way are sent again."""
    end = time.monotonic() + 30
    while (status := device.status()["units"]["0:0"])["sessions"] < 2 or not status["connections"]:
        assert time.monotonic() < end, status
        time.sleep(0.001)


def test_a_disk_of_a_server(listen: Listen) -> None:
    server = Server(bytearray(os.urandom(SIZE)))
    device = controller(open_drive(DriveOptions(listen(server), reconnect=0), "d"))
    with ScsiGuest(device) as guest:
        guest.negotiate()
        connected_again(device)
        assert guest.read(8, 16, offset=8).data == server.data[4096:12288]
        server.seen.clear()
        assert guest.write(3, b"written!" * 64, offset=8).good
        assert guest.command(struct.pack(">BBIBHB", 0x2A, 8, 4, 0, 1, 0), write=b"durable!" * 64).good
        assert guest.command(bytes((0x35,)) + bytes(9)).good
        unmap = struct.pack(">HHIQII", 22, 16, 0, 8, 8, 0)
        assert guest.command(bytes((0x42, 0, 0, 0, 0, 0, 0, 0, len(unmap), 0)), write=unmap).good
        assert guest.command(struct.pack(">BBQIBB", 0x93, 0, 16, 8, 0, 0), write=bytes(512)).good
        assert [each for each in server.seen if each[0] != DISC] == [
            (WRITE, 0, 1536, 512),
            (WRITE, 1, 2048, 512),
            (FLUSH_COMMAND, 0, 0, 0),
            (TRIM_COMMAND, 0, 4096, 4096),
            (ZEROES_COMMAND, 2, 8192, 4096),
        ]
        assert server.data[1536:2560] == b"written!" * 64 + b"durable!" * 64
        status = device.status()["units"]["0:0"]
        assert (status["backend"], status["connections"], status["size"]) == ("nbd", 4, SIZE)
        lba_status = guest.command(struct.pack(">BBQIBB", 0x9E, 0x12, 0, 64, 0, 0), read=64).data
        assert struct.unpack_from(">QIB", lba_status, 8) == (0, SIZE // 1024, 0)
        assert struct.unpack_from(">QIB", lba_status, 24) == (SIZE // 1024, SIZE // 1024, 1)
    device.stop()


@pytest.mark.parametrize(
    ("command", "number", "sense"),
    [
        (READ, errno.EIO, (3, 0x11, 0)),
        (WRITE, errno.EIO, (3, 0x0C, 0)),
        (WRITE, errno.ENOSPC, (7, 0x27, 7)),
        (WRITE, errno.EPERM, (7, 0x27, 0)),
        (WRITE, errno.ESHUTDOWN, (3, 0x0C, 0)),
    ],
)
def test_errors_of_the_server_are_sense_data(
    listen: Listen, command: int, number: int, sense: tuple[int, int, int]
) -> None:
    server = Server(bytearray(SIZE), before=lambda *request: number)
    device = controller(open_drive(DriveOptions(listen(server), reconnect=0), "d"))
    with ScsiGuest(device) as guest:
        guest.negotiate()
        answer = guest.read(0, 1) if command == READ else guest.write(0, bytes(512))
        assert answer.condition == sense
    device.stop()


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({"flags": ALL | 2}, {}, "readonly=on"),
        ({"block_sizes": (4096, 4096, 1 << 25)}, {}, "block=4096"),
        ({"block_sizes": (1, 4096, 65536)}, {}, "at most 65536"),
    ],
)
def test_exports_that_cannot_be_used(
    listen: Listen, changes: dict[str, object], options: dict[str, object], message: str
) -> None:
    server = Server(bytearray(SIZE), **changes)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=message):
        open_drive(DriveOptions(listen(server), **options), "d")  # type: ignore[arg-type]


def test_a_server_that_is_not_there(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(UserError, match="No such file"):
        open_drive(DriveOptions(f"nbd+unix:///?socket={tmp_path}/nothing"), "d")
    assert caplog.records == []  # the message is not printed a second time
    with pytest.raises(UsageError, match="not an NBD URI"):
        open_drive(DriveOptions("nbd:server"), "d")


def test_a_disk_that_may_not_be_written_to(listen: Listen) -> None:
    server = Server(bytearray(SIZE), flags=ALL | 2)
    device = controller(open_drive(DriveOptions(listen(server), readonly=True), "d"))
    with ScsiGuest(device) as guest:
        guest.negotiate()
        assert guest.read(0, 8).good
        assert guest.write(0, bytes(512)).condition == (7, 0x27, 0)
    device.stop()
