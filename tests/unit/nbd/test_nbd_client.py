"""Negotiation, data, broken connections, and servers that lie."""

from __future__ import annotations

import asyncio
import errno
import os
import re
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from vmbus.errors import DeviceError, UserError
from vmbus.machine.io.workers import WorkerThreads
from vmbus_devices.nbd import client as client_module
from vmbus_devices.nbd.client import Client
from vmbus_devices.nbd.connection import Request
from vmbus_devices.nbd.handshake import Export
from vmbus_devices.nbd.wire import Command
from vmbus_devices.scsi.file import Cache
from vmbus_devices.scsi.nbd import NbdBackend

from tests.unit.nbd.nbd_server import (
    ALL,
    DF,
    DF_FLAG,
    FLUSH,
    FLUSH_COMMAND,
    FUA,
    MULTI,
    READ,
    STATUS,
    TRIM,
    TRIM_COMMAND,
    WRITE,
    ZEROES,
    ZEROES_COMMAND,
    Server,
    chunk,
    export_info,
    greeting,
    option_reply,
    simple_reply,
)

SIZE = 1 << 20
TIMEOUT = 20.0

Open = Callable[..., NbdBackend]


@pytest.fixture
def server() -> Server:
    return Server(bytearray(os.urandom(SIZE // 2) + bytes(SIZE // 2)))


@pytest.fixture
def opened() -> Iterator[Open]:
    clients: list[Client] = []

    def make(
        server: Server, *, reconnect: float = 5.0, connections: int = 2, **options: object
    ) -> NbdBackend:
        client = Client(server, "nbd://test", connections=connections, reconnect=reconnect)
        clients.append(client)
        return NbdBackend(client, client.open(), **options)  # type: ignore[arg-type]

    yield make
    for client in clients:
        client.close()
        assert client.wait_closed(TIMEOUT)


def views(length: int, count: int = 4) -> list[memoryview]:
    data = memoryview(bytearray(length))
    step = length // count
    return [data[i * step : (i + 1) * step if i < count - 1 else length] for i in range(count)]


def read(backend: NbdBackend, offset: int, length: int) -> bytes:
    found = views(length)
    backend.read(offset, found)
    return b"".join(found)


# --- what works ---


@pytest.mark.parametrize("structured", [False, True])
def test_data_comes_and_goes_through_scattered_views(server: Server, opened: Open, structured: bool) -> None:
    server.structured = structured
    backend = opened(server)
    assert backend.size == SIZE
    assert backend.client.connections == 2
    data = os.urandom(70_000)
    backend.write(4096, [memoryview(data)[:1000], memoryview(data)[1000:]])
    assert server.data[4096 : 4096 + 70_000] == data
    for offset, length in ((4096, 70_000), (0, 512), (SIZE // 2 - 512, 1024), (SIZE - 4096, 4096)):
        assert read(backend, offset, length) == server.data[offset : offset + length]


def test_data_may_be_in_more_pieces_than_a_system_call_takes(server: Server, opened: Open) -> None:
    backend = opened(server)
    pieces = os.sysconf("SC_IOV_MAX") * 2
    data = os.urandom(pieces * 16)
    done = threading.Event()
    errors: list[Exception | None] = []

    def ended(error: Exception | None) -> None:
        errors.append(error)
        done.set()

    written = [memoryview(data)[at : at + 16] for at in range(0, len(data), 16)]
    backend.start(512, written, len(data), True, False, ended)
    assert done.wait(TIMEOUT)
    assert errors == [None]
    assert server.data[512 : 512 + len(data)] == data
    found = views(len(data), pieces)
    backend.read(512, found)
    assert b"".join(found) == data
    assert backend.client.sessions == 1


def test_many_requests_are_under_way_at_a_time(server: Server, opened: Open) -> None:
    """The server answers none before it has seen them all, and then in the reverse order."""
    backend = opened(server, connections=1)
    count = 40
    cookies: list[tuple[int, int]] = []

    def before(command: int, flags: int, offset: int, length: int, cookie: int) -> bytes:
        cookies.append((cookie, offset))
        if len(cookies) < count:
            return b""
        return b"".join(
            chunk(c, 1, struct.pack(">Q", o) + bytes([o >> 9]) * 512) for c, o in reversed(cookies)
        )

    server.before = before
    done = threading.Semaphore(0)
    order: list[int] = []
    buffers = [memoryview(bytearray(512)) for _ in range(count)]
    for index in range(count):

        def ended(error: Exception | None, index: int = index) -> None:
            assert error is None
            order.append(index)
            done.release()

        backend.start(index * 512, [buffers[index]], 512, False, False, ended)
    for _ in range(count):
        assert done.acquire(timeout=TIMEOUT)
    assert order == list(reversed(range(count)))
    assert [bytes(buffer) for buffer in buffers] == [bytes([index]) * 512 for index in range(count)]


def test_a_write_larger_than_the_socket_takes_does_not_block_who_asks(server: Server, opened: Open) -> None:
    backend = opened(server, connections=1)
    proceed = threading.Event()
    server.before = lambda *request: 0 if proceed.wait(TIMEOUT) else 5
    data = memoryview(os.urandom(SIZE // 2))
    done = threading.Semaphore(0)
    errors: list[Exception | None] = []

    def ended(error: Exception | None) -> None:
        errors.append(error)
        done.release()

    for _ in range(16):  # far more than any socket buffer
        backend.start(0, [data], len(data), True, False, ended)
    proceed.set()
    for _ in range(16):
        assert done.acquire(timeout=TIMEOUT)
    assert errors == [None] * 16
    assert server.data[: len(data)] == data


def test_flags_and_lengths_of_everything_else(server: Server, opened: Open) -> None:
    backend = opened(server)
    server.seen.clear()
    backend.write(0, [memoryview(bytes(512))], fua=True)
    backend.flush()
    backend.discard(512, 1024)
    backend.write_zeroes(0, 4096, unmap=False)
    backend.write_zeroes(0, 4096, unmap=True)
    assert backend.extents(0, 8192) == [(0, 4096, True), (4096, 4096, False)]
    assert server.seen == [
        (WRITE, 1, 0, 512),
        (FLUSH_COMMAND, 0, 0, 0),
        (TRIM_COMMAND, 0, 512, 1024),
        (ZEROES_COMMAND, 2, 0, 4096),
        (ZEROES_COMMAND, 0, 0, 4096),
        (STATUS, 0, 0, 8192),
    ]


def test_what_a_server_cannot_do_is_done_another_way(server: Server, opened: Open) -> None:
    server.flags = 1 | FLUSH
    server.contexts = False
    backend = opened(server)
    assert (backend.can_discard, backend.write_cache, backend.client.connections) == (False, True, 1)
    server.seen.clear()
    backend.write(0, [memoryview(b"x" * 512)], fua=True)
    backend.write_zeroes(0, 512, unmap=True)
    assert backend.extents(0, 8192) == [(0, 8192, True)]
    assert server.seen == [(WRITE, 0, 0, 512), (FLUSH_COMMAND, 0, 0, 0), (WRITE, 0, 0, 512)]
    assert server.data[:512] == bytes(512)
    server.flags = 1
    other = opened(server)
    assert (other.write_cache, other.flush_needed) == (False, False)


@pytest.mark.parametrize(
    ("cache", "seen"),
    [
        (Cache.NONE, [(WRITE, 0), (WRITE, 1), (FLUSH_COMMAND, 0)]),
        (Cache.WRITETHROUGH, [(WRITE, 1), (WRITE, 1)]),
        (Cache.UNSAFE, [(WRITE, 0), (WRITE, 0)]),
    ],
)
def test_cache_modes(server: Server, opened: Open, cache: Cache, seen: list[tuple[int, int]]) -> None:
    backend = opened(server, cache=cache)
    server.seen.clear()
    backend.write(0, [memoryview(bytes(512))])
    backend.write(0, [memoryview(bytes(512))], fua=True)
    backend.flush()
    assert [each[:2] for each in server.seen] == seen
    assert backend.write_cache == (cache is not Cache.WRITETHROUGH)


# --- errors ---


@pytest.mark.parametrize("structured", [False, True])
@pytest.mark.parametrize(
    ("number", "found"), [(errno.ENOSPC, errno.ENOSPC), (errno.EPERM, errno.EPERM), (4711, errno.EIO)]
)
def test_an_error_of_the_server_is_one_of_the_request(
    server: Server, opened: Open, structured: bool, number: int, found: int
) -> None:
    backend = opened(server)

    def before(command: int, flags: int, offset: int, length: int, cookie: int) -> int | bytes:
        if structured:
            return chunk(cookie, 0x8001, struct.pack(">IH", number, 3) + b"why")
        return number

    server.before = before
    reason = re.escape(os.strerror(found) + (" (why)" if structured else ""))
    with pytest.raises(OSError, match=f"{reason}$") as raised:
        backend.write(0, [memoryview(bytes(512))])
    assert raised.value.errno == found
    server.before = None
    assert read(backend, 0, 512) == server.data[:512]
    assert backend.client.sessions == 1


def test_requests_go_on_over_a_new_connection(server: Server, opened: Open) -> None:
    backend = opened(server)
    lost = threading.Semaphore(3)

    def before(*request: int) -> int:
        if lost.acquire(blocking=False):
            server.hang_up()
        return 0

    server.before = before
    assert read(backend, 0, 65536) == server.data[:65536]
    backend.write(0, [memoryview(bytes(4096))])
    assert server.data[:4096] == bytes(4096)
    assert backend.client.sessions > 1
    assert server.ended_sessions == backend.client.sessions - 1


def test_a_server_that_stays_away_costs_errors_and_comes_back(server: Server, opened: Open) -> None:
    backend = opened(server, reconnect=0.1)
    server.refuse = True
    server.hang_up()
    with pytest.raises(OSError, match="refused") as raised:
        while True:  # one may be answered before it is noticed
            read(backend, 0, 512)
    assert raised.value.errno == errno.EIO
    with pytest.raises(OSError, match="refused"):  # at once now
        read(backend, 0, 512)
    assert "refused" in backend.status()["trouble"]
    server.refuse = False
    for _ in range(200):
        try:
            assert read(backend, 0, 512) == server.data[:512]
            break
        except OSError:
            threading.Event().wait(0.02)
    assert "trouble" not in backend.status()


def test_an_error_of_the_connector_costs_an_attempt_and_not_the_disk(
    server: Server, opened: Open, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    backend = opened(server)
    connect, failures = server.connect, [KeyError("desc"), RecursionError("too many brackets")]

    def broken(number: int) -> socket.socket:
        if failures:
            raise failures.pop()
        return connect(number)

    monkeypatch.setattr(server, "connect", broken)
    server.hang_up()
    found = views(512)
    done = threading.Event()
    errors: list[Exception | None] = []

    def ended(error: Exception | None) -> None:
        errors.append(error)
        done.set()

    backend.start(0, found, 512, False, False, ended)
    assert done.wait(TIMEOUT)
    assert errors == [None]
    assert b"".join(found) == server.data[:512]
    assert "too many brackets" in caplog.text


@pytest.mark.parametrize("name", ["nbd-receiver", "nbd-sender"])
def test_a_thread_that_cannot_be_started_costs_the_connection_and_not_the_disk(
    server: Server, opened: Open, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    backend = opened(server)
    start, refused = threading.Thread.start, threading.Semaphore(1)

    def limited(thread: threading.Thread) -> None:
        if thread.name == name and refused.acquire(blocking=False):
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", limited)
    if name == "nbd-receiver":
        server.hang_up()
    large = views(SIZE)
    errors: list[Exception | None] = []
    ended = threading.Semaphore(0)

    def end(error: Exception | None) -> None:
        errors.append(error)
        ended.release()

    gate = threading.Event()
    server.before = lambda *request: (gate.wait(TIMEOUT), None)[1]
    for _ in range(40):  # more than the sockets take
        backend.start(0, large, SIZE, True, False, end)
    gate.set()
    for _ in range(40):
        assert ended.acquire(timeout=TIMEOUT)
    assert errors == [None] * 40
    assert not refused.acquire(blocking=False)
    assert backend.client.sessions > 1
    assert read(backend, 0, 512) == bytes(512)


@pytest.mark.parametrize(("queue", "sessions"), [(0, 2), (7, 1)])
def test_a_server_that_hangs_up_where_it_cannot_read_is_asked_for_the_whole(
    server: Server, opened: Open, queue: int, sessions: int
) -> None:
    """As QEMU's does for reads whose answer may be in parts: the error is known at the second attempt.

    Where a read comes from a queue it is known at the first.
    """
    server.flags |= DF

    def before(command: int, flags: int, offset: int, length: int, cookie: int) -> int | bytes:
        if command != READ or offset != 4096:
            return 0
        if flags & DF_FLAG:
            return errno.EIO
        server.hang_up()
        return b""

    server.before = before
    backend = opened(server, reconnect=TIMEOUT, connections=1)
    backend.queue = queue
    errors: list[Exception | None] = []
    done = threading.Event()

    def ended(error: Exception | None) -> None:
        errors.append(error)
        done.set()

    backend.start(4096, [memoryview(bytearray(512))], 512, False, False, ended)
    assert done.wait(TIMEOUT / 2)
    [error] = errors
    assert isinstance(error, OSError)
    assert error.errno == errno.EIO
    assert backend.client.sessions == sessions
    assert backend.client.trouble == ""


def test_a_client_without_a_thread_says_what_to_do(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refused)
    with pytest.raises(
        UserError, match="nbd://test cannot be connected: can't start new thread; raise the limit"
    ):
        Client(server, "nbd://test")


@pytest.mark.parametrize("structured", [False, True])
def test_a_request_that_is_never_answered_while_others_are_fails_in_time(
    server: Server, opened: Open, monkeypatch: pytest.MonkeyPatch, structured: bool
) -> None:
    monkeypatch.setattr("vmbus_devices.nbd.client.STALL_TIMEOUT", 0.8)
    monkeypatch.setattr("vmbus_devices.scsi.nbd._SLOW", 0.0, raising=False)
    server.structured = structured
    server.before = lambda command, flags, offset, *rest: b"" if offset == 4096 else None
    backend = opened(server, reconnect=1.0, connections=1)
    errors: list[Exception | None] = []
    done = threading.Event()

    def ended(error: Exception | None) -> None:
        errors.append(error)
        done.set()

    backend.start(4096, [memoryview(bytearray(512))], 512, False, False, ended)
    end = time.monotonic() + TIMEOUT
    waits = 0.0
    while not done.is_set():
        assert time.monotonic() < end, "the request waits without end"
        assert read(backend, 0, 512) == server.data[:512]
        waits = max(waits, backend.status().get("waits", 0))
    assert isinstance(errors[0], OSError)
    assert "while it answered others" in str(errors[0])
    assert backend.client.sessions > 1, "it was repeated over a new connection"
    assert waits > 0.2
    assert read(backend, 0, 512) == server.data[:512]
    assert errors[1:] == []


def test_a_request_behind_others_on_a_slow_connection_is_waited_for(
    server: Server, opened: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vmbus_devices.nbd.client.STALL_TIMEOUT", 1.2)
    backend = opened(server, connections=1)
    server.before = lambda *request: (threading.Event().wait(0.15), None)[1]
    errors: list[Exception | None] = []
    ended = threading.Semaphore(0)

    def end(error: Exception | None) -> None:
        errors.append(error)
        ended.release()

    for _ in range(12):
        backend.start(0, [memoryview(bytearray(512))], 512, False, False, end)
    for _ in range(12):
        assert ended.acquire(timeout=TIMEOUT)
    assert errors == [None] * 12
    assert backend.client.sessions == 1


def test_what_is_under_way_fails_when_the_disk_is_closed(server: Server, opened: Open) -> None:
    backend = opened(server)
    server.before = lambda *request: b""  # no answer
    errors: list[Exception | None] = []
    done = threading.Event()

    def ended(error: Exception | None) -> None:
        errors.append(error)
        done.set()

    backend.start(0, [memoryview(bytearray(512))], 512, False, False, ended)
    backend.close()
    assert backend.wait_closed(TIMEOUT)
    assert done.wait(TIMEOUT)
    assert isinstance(errors[0], OSError)
    with pytest.raises(OSError, match="closed"):
        read(backend, 0, 512)


def test_a_larger_export_is_seen_when_it_is_looked_for(server: Server, opened: Open) -> None:
    backend = opened(server)
    server.data += bytes(SIZE)
    backend.reread_size()
    assert backend.refresh() == 2 * SIZE


# --- servers that lie ---

INFO = option_reply(8, 1) + option_reply(10, 1) + option_reply(7, 3, export_info(SIZE, ALL))


@pytest.mark.parametrize(
    ("negotiation", "message"),
    [
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", "not an NBD server"),
        (greeting(0), "too old"),
        (greeting() + option_reply(9, 1), "breaks the NBD protocol"),
        (greeting() + option_reply(8, 1, bytes(1 << 20)), "breaks the NBD protocol"),
        (greeting() + option_reply(8, 1) + option_reply(10, 4, bytes(4) + b"x") * 200, "too many contexts"),
        (greeting() + option_reply(8, 1) + option_reply(10, 1) + option_reply(7, 1), "size of the export"),
        (greeting() + INFO + option_reply(7, 3, bytes(12)) * 200, "too many answers"),
        (greeting() + INFO[:-2], "not answer"),
        (greeting() + INFO + option_reply(7, 3, b"\0\3" + bytes(12)), "impossible block sizes"),
        (greeting() + INFO + option_reply(7, 3, b"\0\0\0"), "breaks the NBD protocol"),
        (
            greeting() + INFO + option_reply(7, 3, export_info(1 << 63, 1)) + option_reply(7, 1),
            "impossible size",
        ),
        (greeting() + option_reply(8, 0x80000001) + option_reply(7, 0x80000005), "TLS"),
    ],
)
def test_a_negotiation_that_goes_wrong_is_told(
    server: Server, negotiation: bytes, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.negotiation = negotiation
    connect = server.connect

    def impatient(number: int) -> socket.socket:
        stream = connect(number)
        stream.settimeout(0.2)
        return stream

    monkeypatch.setattr(server, "connect", impatient)
    with pytest.raises(DeviceError, match=message):
        Client(server, "nbd://test").open()


def test_an_export_that_is_not_there(server: Server) -> None:
    server.export = "other"
    client_sees = Server(server.data, export="disk")
    client_sees.connect = server.connect  # type: ignore[method-assign]
    with pytest.raises(DeviceError, match="no export 'disk': no such export"):
        Client(client_sees, "nbd://test").open()


Lie = Callable[[int, int, int], bytes]
LIES: dict[str, Lie] = {
    "an unknown cookie": lambda cookie, offset, length: simple_reply(cookie + 1),
    "no magic": lambda cookie, offset, length: bytes(16),
    "data before the request": lambda cookie, offset, length: chunk(
        cookie, 1, struct.pack(">Q", 0) + b"x" * 512
    ),
    "data behind the request": lambda cookie, offset, length: chunk(
        cookie, 1, struct.pack(">Q", offset + length - 1) + b"xx"
    ),
    "data of no length": lambda cookie, offset, length: chunk(cookie, 1, struct.pack(">Q", offset)),
    "a chunk shorter than its offset": lambda cookie, offset, length: chunk(cookie, 1, b"1234"),
    "a hole as large as the world": lambda cookie, offset, length: chunk(
        cookie, 2, struct.pack(">QI", offset, 0xFFFFFFFF)
    ),
    "a part of the data": lambda cookie, offset, length: chunk(
        cookie, 1, struct.pack(">Q", offset) + b"x" * 8
    ),
    "block status for a read": lambda cookie, offset, length: chunk(
        cookie, 5, struct.pack(">III", 77, 512, 0)
    ),
    "a chunk of an unknown type": lambda cookie, offset, length: chunk(cookie, 99, b"abc"),
    "a chunk of four gigabytes": lambda cookie, offset, length: struct.pack(
        ">IHHQI", 0x668E33EF, 1, 0x8001, cookie, 0xFFFFFFFF
    ),
    "an error without a number": lambda cookie, offset, length: chunk(cookie, 0x8001, b"12"),
}


@pytest.mark.parametrize("lie", LIES.values(), ids=LIES.keys())
def test_a_lie_costs_the_request_in_time(server: Server, opened: Open, lie: Lie) -> None:
    backend = opened(server, reconnect=0.0)
    server.before = lambda command, flags, offset, length, cookie: lie(cookie, offset, length)
    with pytest.raises(OSError, match="NBD protocol") as raised:
        read(backend, 8192, 4096)
    assert raised.value.errno == errno.EIO
    server.before = None
    for _ in range(200):
        try:
            assert read(backend, 8192, 4096) == server.data[8192:12288]
            return
        except OSError:
            threading.Event().wait(0.02)
    raise AssertionError("it never came back")


@settings(max_examples=30, deadline=None)
@given(st.binary(max_size=64), st.booleans())
def test_no_answer_at_all_harms_anything(garbage: bytes, cut: bool) -> None:
    """Whatever comes: the request ends, and nothing outside of its buffer is written to."""
    server = Server(bytearray(65536))
    client = Client(server, "nbd://test", connections=1, reconnect=0.0)
    export: Export = client.open()
    assert export.size == 65536
    around = memoryview(bytearray(b"\xaa" * 1536))
    prefix = [b"", b"\x67\x44\x66\x98", b"\x66\x8e\x33\xef"][len(garbage) % 3]

    def before(command: int, flags: int, offset: int, length: int, cookie: int) -> bytes:
        answer = prefix + garbage
        if cut:
            answer = answer[:8] + struct.pack(">Q", cookie) + answer[8:]
        server.hang_up() if len(answer) < 16 else None
        return answer

    server.before = before
    done = threading.Event()
    client.submit(Request(Command.READ, 0, 512, lambda error: done.set(), [around[512:1024]]))
    threading.Timer(0.01, client.close).start()
    assert done.wait(TIMEOUT)
    assert client.wait_closed(TIMEOUT)
    assert around[:512] == around[1024:] == b"\xaa" * 512


def test_constants_are_the_protocols() -> None:
    assert (FLUSH, FUA, TRIM, ZEROES, MULTI, READ) == (4, 8, 32, 64, 256, 0)


async def test_replies_are_taken_by_an_event_loop_once_there_is_one(server: Server, opened: Open) -> None:
    """Many requests in parts, over connections that break in between; all of it ends in the loop's thread."""

    workers = WorkerThreads(asyncio.get_running_loop(), 2)
    backend = opened(server)
    backend.use(workers)
    loop_thread = threading.get_ident()
    threads: set[int] = set()
    errors: list[Exception | None] = []
    buffers = [views(8192) for _ in range(200)]

    def done(error: Exception | None) -> None:
        threads.add(threading.get_ident())
        errors.append(error)

    for turn in range(4):
        for index, buffer in enumerate(buffers[turn * 50 : turn * 50 + 50]):
            backend.start((turn * 50 + index) * 512, buffer, 8192, False, False, workers.expect(done))
        await asyncio.sleep(0.01)
        server.hang_up()
    assert await workers.settle(TIMEOUT)
    assert errors == [None] * 200
    assert threads == {loop_thread}
    for index, buffer in enumerate(buffers):
        assert b"".join(buffer) == server.data[index * 512 : index * 512 + 8192]
    server.before = lambda command, flags, offset, length, cookie: bytes(16)  # a lie
    backend.client._reconnect = 0.0
    backend.start(0, views(512), 512, False, False, workers.expect(done))
    assert await workers.settle(TIMEOUT)
    assert isinstance(errors[-1], OSError)
    backend.close()
    assert await asyncio.to_thread(backend.wait_closed, TIMEOUT)
    workers.close()


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + TIMEOUT
    while not condition():
        assert time.monotonic() < end, "it does not come"
        time.sleep(0.01)


def test_a_session_that_is_given_up_while_it_is_made_is_replaced(
    server: Server, opened: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    client: list[Client] = []
    connect = server.connect

    def give_up(number: int) -> socket.socket:
        if server.sessions == 1 and number == 0:
            client[0].lose(DeviceError("no good"))
        return connect(number)

    monkeypatch.setattr(server, "connect", give_up)
    backend = opened(server)
    client.append(backend.client)
    server.hang_up()
    until(lambda: server.sessions == 3)
    assert read(backend, 0, 512) == server.data[:512]


def test_a_session_that_is_given_up_is_replaced(server: Server, opened: Open) -> None:
    backend = opened(server)
    backend.client.lose(DeviceError("no good"))
    view = memoryview(bytearray(512))
    until(lambda: server.sessions == 2)
    backend.read(0, [view])
    assert bytes(view) == server.data[:512]


@pytest.mark.parametrize(("under_way", "sessions"), [(1, 2), (0, 1)])
def test_a_server_that_does_nothing_beside_the_connections_is_lost(
    server: Server, opened: Open, monkeypatch: pytest.MonkeyPatch, under_way: int, sessions: int
) -> None:
    monkeypatch.setattr(client_module, "STALL_TIMEOUT", 0.2)
    server.beside = (7, under_way)
    backend = opened(server)
    until(lambda: server.sessions == sessions)
    server.beside = (7, 0)
    view = memoryview(bytearray(512))
    backend.read(0, [view])
    assert server.sessions >= sessions


def test_a_server_that_leaves_out_a_request_beside_the_connections_is_lost_once(
    server: Server, opened: Open, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(client_module, "STALL_TIMEOUT", 0.2)
    server.beside = (7, 1)
    server.beside_overtaken = time.monotonic()
    backend = opened(server)
    while not server.given_up:
        assert time.monotonic() < server.beside_overtaken + TIMEOUT, "it does not come"
        server.beside = (server.beside[0] + 1, 1)  # it does something
        time.sleep(0.01)
    server.beside_overtaken = None
    server.beside = (0, 0)
    until(lambda: server.sessions == 2)
    assert server.given_up == ["the server has not answered a request for 0.2 s, while it answered others"]
    assert server.given_up[0] in caplog.text
    assert read(backend, 0, 512) == server.data[:512]
