"""The second carrier without a machine: frames, and who says what over a socket."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import tempfile
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st
from vmbus.errors import MalformedError, UsageError, UserError
from vmbus.machine.migration import side_channel
from vmbus.machine.migration.side_channel import CarrierAddress, IncomingCarrier, OutgoingCarrier
from vmbus.saving import Reason, StateRefused
from vmbus.wire.frame import FRAME_HEADER, REFERENCE, Reference, build_frame, frame_size, parse_frame

MACHINE, OTHER, MIGRATION, NONE = UUID(int=1), UUID(int=2), UUID(int=3), UUID(int=0)
STATE = bytes(range(256)) * 3


def frame(state: bytes = STATE, *, machine: UUID = MACHINE, ran: bool = True) -> bytes:
    return build_frame(machine=machine, migration=MIGRATION, ran=ran, writer="vmbus-emulator 1", state=state)


@given(st.binary(max_size=300), st.booleans())
def test_a_frame_comes_back_as_it_was(state: bytes, ran: bool) -> None:
    data = frame(state, ran=ran)
    found = parse_frame(data)
    assert (found.state, found.ran, found.machine, found.migration) == (state, ran, MACHINE, MIGRATION)
    assert found.writer == "vmbus-emulator 1"
    assert found.digest == data[-32:]
    assert frame_size(data[: FRAME_HEADER.size]) == len(data)


@given(st.data())
def test_a_frame_with_any_byte_changed_is_refused(data: st.DataObject) -> None:
    sound = frame()
    place = data.draw(st.integers(0, len(sound) - 1))
    changed = sound[place] ^ data.draw(st.integers(1, 255))
    with pytest.raises(MalformedError):
        parse_frame(sound[:place] + bytes((changed,)) + sound[place + 1 :])


@given(st.integers(0, len(frame()) - 1))
def test_a_frame_that_ends_early_is_refused(length: int) -> None:
    with pytest.raises(MalformedError):
        parse_frame(frame()[:length])


def test_a_frame_with_something_behind_it_is_refused() -> None:
    with pytest.raises(MalformedError, match="trailing"):
        parse_frame(frame() + b"\0")


def test_a_frame_that_is_too_large_is_refused_before_it_is_read() -> None:
    header = FRAME_HEADER.parse(frame())
    with pytest.raises(MalformedError, match="too-large"):
        frame_size(FRAME_HEADER.build(type(header)(1, 0, 1, MACHINE, MIGRATION, 1 << 40, bytes(32))))


def test_a_reference_is_no_state() -> None:
    reference = REFERENCE.build(Reference(frame()[-32:]))
    assert REFERENCE.parse(reference).digest == parse_frame(frame()).digest
    with pytest.raises(MalformedError):
        REFERENCE.parse(b"VMBc" + reference[4:])


def test_an_address_has_a_kind_and_a_path() -> None:
    assert str(CarrierAddress.parse("unix:/a/b")) == "unix:/a/b"
    for text in ("tcp:1:2", "unix:", "/a/b"):
        with pytest.raises(UsageError, match="unix:PATH"):
            CarrierAddress.parse(text)


# --- a socket -------------------------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def target(
    address: CarrierAddress, check: Callable[[bytes], None] = lambda _: None
) -> AsyncIterator[IncomingCarrier]:
    found = await IncomingCarrier.listen(address, MACHINE, check)
    try:
        yield found
    finally:
        await found.close()


async def test_the_source_goes_on_when_the_target_has_accepted(tmp_path: Path) -> None:
    address = CarrierAddress("unix", tmp_path / "c")
    async with target(address) as there:
        source = await OutgoingCarrier.open(address, MACHINE)
        with pytest.raises(StateRefused, match="no state has arrived"):
            there.frame()
        await source.deliver(frame())
        assert there.frame().state == STATE
        assert there.frame(frame()[-32:]).state == STATE
        with pytest.raises(StateRefused, match="another migration"):
            there.frame(bytes(32))
        await source.close()
    assert not address.path.exists()


async def test_a_state_that_came_before_is_not_taken_for_that_of_a_later_connection(tmp_path: Path) -> None:
    """Its migration was cancelled; without dbus-vmstate nothing else says which state belongs to the memory."""
    address = CarrierAddress("unix", tmp_path / "c")
    async with target(address) as there:
        first = await OutgoingCarrier.open(address, MACHINE)
        await first.deliver(frame())
        await first.close()
        second = await OutgoingCarrier.open(address, MACHINE)
        with pytest.raises(StateRefused, match="no state has arrived"):
            there.frame()
        await second.close()


def refuse(state: bytes) -> None:
    raise StateRefused(Reason.NOT_THERE, "no such channel")


@pytest.mark.parametrize(
    ("data", "check", "why"),
    [
        pytest.param(frame()[:-1] + b"x", lambda _: None, "damaged", id="damaged"),
        pytest.param(frame(machine=OTHER), lambda _: None, "state belongs to machine", id="another machine"),
        pytest.param(frame(), refuse, "no such channel", id="not accepted"),
    ],
)
async def test_what_the_target_refuses_it_does_not_keep(
    tmp_path: Path, data: bytes, check: Callable[[bytes], None], why: str
) -> None:
    address = CarrierAddress("unix", tmp_path / "c")
    async with target(address, check) as there:
        source = await OutgoingCarrier.open(address, MACHINE)
        with pytest.raises(StateRefused, match=why):
            await source.deliver(data)
        with pytest.raises(StateRefused, match="no state has arrived"):
            there.frame()
        await source.close()


async def test_a_target_that_goes_away_before_it_has_answered_has_not_accepted(tmp_path: Path) -> None:
    address = CarrierAddress("unix", tmp_path / "c")

    def dies(state: bytes) -> None:
        raise ConnectionResetError

    async with target(address, dies):
        source = await OutgoingCarrier.open(address, MACHINE)
        with pytest.raises(StateRefused, match="did not confirm"):
            await source.deliver(frame())
        await source.close()


async def test_a_reason_with_a_name_that_is_no_unicode_reaches_the_source(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.CRITICAL)  # pytest-xdist cannot transfer a log with such a name

    def check(state: bytes) -> None:
        raise StateRefused(Reason.NOT_THERE, "cannot open /a\udcff")

    address = CarrierAddress("unix", tmp_path / "c")
    async with target(address, check):
        source = await OutgoingCarrier.open(address, MACHINE)
        with pytest.raises(StateRefused, match=r"cannot open /a\\udcff"):
            await source.deliver(frame())
        await source.close()


async def test_nobody_and_another_machine_are_told_before_anything_happens(tmp_path: Path) -> None:
    address = CarrierAddress("unix", tmp_path / "c")
    with pytest.raises(UserError, match="start the target with --carrier"):
        await OutgoingCarrier.open(address, MACHINE)
    async with target(address):
        with pytest.raises(UserError, match="waits for machine"):
            await OutgoingCarrier.open(address, OTHER)


async def test_machines_without_a_uuid_get_one_for_the_connection(tmp_path: Path) -> None:
    address = CarrierAddress("unix", tmp_path / "c")
    there = await IncomingCarrier.listen(address, NONE, lambda _: None)
    first, second = [await OutgoingCarrier.open(address, NONE) for _ in range(2)]
    assert NONE not in (first.machine, second.machine) and first.machine != second.machine
    for stray in (NONE, second.machine):
        with pytest.raises(StateRefused, match="state belongs to machine"):
            await first.deliver(frame(machine=stray))
        await first.close()
        first = await OutgoingCarrier.open(address, NONE)
    await first.deliver(frame(machine=first.machine))
    assert there.frame().state == STATE
    with pytest.raises(UserError, match="waits for machine"):  # one that has a UUID is another machine
        await OutgoingCarrier.open(address, MACHINE)
    for each in (first, second):
        await each.close()
    await there.close()


async def test_another_user_neither_sends_nor_receives_a_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(
        side_channel, "_ours", lambda uid: uid != os.getuid()
    )  # as another user sees this one
    address = CarrierAddress("unix", tmp_path / "c")
    async with target(address) as there:
        with pytest.raises(UserError, match=f"belongs to user {os.getuid()}"):
            await OutgoingCarrier.open(address, MACHINE)
        reader, writer = await asyncio.open_unix_connection(str(address.path))
        async with asyncio.timeout(10):
            assert await reader.read() == b""  # not even a greeting
        writer.close()
        with pytest.raises(StateRefused, match="no state has arrived"):
            there.frame()
    assert f"belongs to user {os.getuid()}" in caplog.text


@pytest.mark.skipif(
    os.getuid() != 0 or not Path("/usr/bin/python3").exists(),
    reason="needs root, to become another user, and a Python that all users can execute",
)
async def test_a_process_of_another_user_is_turned_away() -> None:
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        address = CarrierAddress("unix", Path(folder) / "c")
        async with target(address):
            address.path.chmod(0o666)
            process = await asyncio.create_subprocess_exec(
                "/usr/bin/python3",
                "-c",
                "import socket, sys\n"
                "s = socket.socket(socket.AF_UNIX); s.connect(sys.argv[1]); sys.exit(len(s.recv(64)))",
                str(address.path),
                user=65534,
                group=65534,
                extra_groups=(),
            )
            async with asyncio.timeout(30):
                assert await process.wait() == 0


async def test_a_file_in_the_place_of_the_socket_is_kept(tmp_path: Path) -> None:
    address = CarrierAddress("unix", tmp_path / "disk.img")
    address.path.write_text("precious")
    with pytest.raises(UserError, match="not a socket"):
        await IncomingCarrier.listen(address, MACHINE, lambda _: None)
    assert address.path.read_text() == "precious"


# --- a file ---------------------------------------------------------------------------------------------------


async def test_a_file_is_there_whole_or_not_at_all(tmp_path: Path) -> None:
    address = CarrierAddress("file", tmp_path / "state")
    source = await OutgoingCarrier.open(address, MACHINE)
    await source.deliver(frame())
    assert [path.name for path in tmp_path.iterdir()] == ["state"]
    assert address.path.stat().st_mode & 0o777 == 0o600
    async with target(address) as there:
        assert there.frame().state == STATE
        address.path.write_bytes(frame()[:-5])
        with pytest.raises(MalformedError, match="truncated"):
            there.frame()
        address.path.unlink()
        with pytest.raises(StateRefused, match="cannot read the state"):
            there.frame()
    address.path.mkdir()
    with pytest.raises(StateRefused, match="cannot write"):
        await source.deliver(frame())


async def test_a_file_that_was_put_there_before_is_not_written_to(tmp_path: Path) -> None:
    address = CarrierAddress("file", tmp_path / "state")
    precious = tmp_path / "precious"
    precious.write_text("precious")
    (tmp_path / "state.part").symlink_to(precious)
    address.path.symlink_to(precious)
    source = await OutgoingCarrier.open(address, MACHINE)
    await source.deliver(frame())
    assert precious.read_text() == "precious"
    assert not address.path.is_symlink()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["precious", "state", "state.part"]


async def test_a_file_is_read_if_nobody_else_can_have_written_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    address = CarrierAddress("file", tmp_path / "state")
    async with target(address) as there:
        address.path.write_bytes(frame())
        address.path.chmod(0o644)
        assert there.frame().state == STATE
        address.path.chmod(0o666)
        with pytest.raises(StateRefused, match="nobody but you can write"):
            there.frame()
        address.path.chmod(0o600)
        monkeypatch.setattr(side_channel, "_ours", lambda uid: False)
        with pytest.raises(StateRefused, match="belongs to user"):
            there.frame()
        monkeypatch.undo()
        address.path.unlink()
        os.mkfifo(address.path)  # read() would wait for a writer, and the event loop with it
        with pytest.raises(StateRefused, match="not a regular file"):
            there.frame()
        address.path.unlink()
        address.path.symlink_to(tmp_path / "other")
        (tmp_path / "other").write_bytes(frame())
        with pytest.raises(StateRefused, match="cannot read the state"):
            there.frame()


async def test_a_file_is_read_up_to_the_size_of_a_frame(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    address = CarrierAddress("file", tmp_path / "state")
    monkeypatch.setattr(side_channel, "_MAX_FRAME", len(frame()))
    async with target(address) as there:
        address.path.write_bytes(frame())
        assert there.frame().state == STATE
        address.path.write_bytes(frame() + b"x")
        with pytest.raises(StateRefused, match="has more than"):
            there.frame()


async def test_a_target_that_closes_ends_its_connections(tmp_path: Path) -> None:
    address = CarrierAddress("unix", tmp_path / "side")
    before = asyncio.all_tasks()
    incoming = await IncomingCarrier.listen(address, MACHINE, lambda state: None)
    outgoing = await OutgoingCarrier.open(address, MACHINE)
    await incoming.close()
    assert asyncio.all_tasks() == before
    with pytest.raises(StateRefused, match="did not confirm"):
        await outgoing.deliver(frame())
    await outgoing.close()


async def test_a_source_that_is_cancelled_while_it_connects_leaves_no_connection(tmp_path: Path) -> None:
    path = tmp_path / "side"
    gone = asyncio.Event()
    there = asyncio.Event()

    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there.set()
        await reader.read()
        writer.close()
        gone.set()

    async with await asyncio.start_unix_server(silent, str(path)):
        opening = asyncio.ensure_future(OutgoingCarrier.open(CarrierAddress("unix", path), MACHINE))
        await there.wait()
        opening.cancel()
        with pytest.raises(asyncio.CancelledError):
            await opening
        async with asyncio.timeout(20):
            await gone.wait()
