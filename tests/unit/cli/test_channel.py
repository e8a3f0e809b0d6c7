"""``vmbus channel``: what is shown and written, and what is refused, over a real control socket."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from vmbus.bus.io.channel_io import ChannelIo
from vmbus.cli import channel as verb
from vmbus.cli import main
from vmbus.errors import UserError
from vmbus.machine import rundir
from vmbus.machine.control import ControlServer
from vmbus.machine.host import Host
from vmbus.machine.migration.state_machine import Phase
from vmbus.saving import ChannelSaver, NtStatus
from vmbus.saving.device_channel import DeviceChannel

from tests.unit.saving.test_device_channel import Keeper, Process, fill


class Slow(Keeper):
    """Has work under way until ``looks`` others have asked."""

    looks = 0

    def settled(self, io: ChannelIo) -> bool:
        self.looks -= 1
        return self.looks < 0


class FakeState:
    """The part of ``HostState`` that is used, with one channel."""

    def __init__(self) -> None:
        self.process = Process()
        self.process.device.__class__ = Slow
        self.process.guest.open()
        fill(self.process)
        self.channel = self.process.channel
        self.saver: ChannelSaver = self.process.saver

    def channels(self) -> tuple[DeviceChannel, ...]:
        return (self.channel,)

    def hold_channel(self, channel: DeviceChannel) -> NtStatus:
        return self.saver.pause(channel)

    def start_channel(self, channel: DeviceChannel) -> NtStatus:
        return self.saver.start(channel)


class FakeHost:
    def __init__(self) -> None:
        self.state = FakeState()
        self.migration = SimpleNamespace(phase=Phase.IDLE, command="")

    @property
    def device(self) -> Slow:
        return cast("Slow", self.state.process.device)


Vmbus = Callable[..., tuple[int, str, str]]


@pytest.fixture
def host() -> FakeHost:
    return FakeHost()


@pytest.fixture
def vmbus(
    host: FakeHost, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Vmbus:
    """Runs ``vmbus channel ...`` against a control socket of ``host``: exit status, output, errors."""
    monkeypatch.setattr(rundir, "find", lambda name: tmp_path)

    async def handler(request: Any) -> object:
        return await verb.answer(cast("Host", host), request)

    async def run(words: tuple[str, ...]) -> int:
        server = ControlServer(tmp_path / "control.sock", {"channel": handler})
        await server.start()
        try:
            return await asyncio.to_thread(main, ["channel", *words])
        finally:
            await server.stop()

    def call(*words: str) -> tuple[int, str, str]:
        capsys.readouterr()
        status = asyncio.run(run(words))
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return call


def test_list_names_channels_and_their_states(host: FakeHost, vmbus: Vmbus) -> None:
    status, out, _ = vmbus("list")
    assert status == 0
    assert out.splitlines()[1].split()[:4] == ["keeper", "1", "open", "active"]
    vmbus("pause", "keeper")
    [found] = json.loads(vmbus("list", "--json")[1])["channels"]
    assert (found["axis"], found["owed"], found["awaited"]) == ("paused", 2, 2)
    assert found["identity"] == str(host.state.channel.identity)


def test_a_channel_is_saved_and_restored_call_by_call(host: FakeHost, vmbus: Vmbus, tmp_path: Path) -> None:
    file = tmp_path / "keeper.chunks"
    status, out, _ = vmbus("pause", "keeper")
    assert (status, out) == (
        0,
        "keeper: VmbChannelPause returned STATUS_SUCCESS; 2 requests were taken and are not completed\n",
    )
    status, out, _ = vmbus("save", "keeper", str(file), "--buffer", "64", "--dump")
    assert status == 0
    lines = [line.split() for line in out.splitlines()]
    assert lines[1] == ["VmbChannelSaveBegin", "STATUS_SUCCESS", "0x00000000"]
    assert lines[2][:5] == ["VmbChannelSaveContinue", "STATUS_BUFFER_TOO_SMALL", "0xc0000023", "64", "0"]
    assert lines[3][:3] == ["VmbChannelSaveContinue", "STATUS_BUFFER_OVERFLOW", "0x80000005"]
    assert lines[3][3] == lines[3][4] == lines[2][5]
    assert ["VmbChannelSaveEnd", "(VOID)"] in lines
    assert "chunk 0 at 0: CHANNEL version 1" in out
    assert file.stat().st_mode & 0o777 == 0o600
    status, out, _ = vmbus("restore", "keeper", str(file), "--buffer", "300")
    assert status == 0
    assert out.count("STATUS_MORE_PROCESSING_REQUIRED") > 2
    assert out.splitlines()[-1].split()[:2] == ["VmbChannelRestoreFromBuffer", "STATUS_SUCCESS"]
    status, out, _ = vmbus("start", "keeper")
    assert (status, out.partition(";")[0]) == (0, "keeper: VmbChannelStart returned STATUS_SUCCESS")
    assert host.device.resumptions == 1
    assert sorted(each for each in host.device.kept if each > 0) == [1, 3]


def test_dump_needs_no_guest(vmbus: Vmbus, tmp_path: Path) -> None:
    file = tmp_path / "keeper.chunks"
    vmbus("pause", "keeper")
    vmbus("save", "keeper", str(file))
    status, out, _ = vmbus("dump", str(file))
    assert status == 0
    assert "TAKEN version" in out
    file.write_bytes(file.read_bytes()[:-1])
    status, _, err = vmbus("dump", str(file))
    assert (status, "truncated" in err) == (1, True)


def test_an_active_channel_is_refused_by_the_call_itself(vmbus: Vmbus, tmp_path: Path) -> None:
    file = tmp_path / "keeper.chunks"
    status, out, err = vmbus("save", "keeper", str(file))
    assert status == 1
    assert "STATUS_INVALID_DEVICE_STATE" in out
    assert err == "vmbus channel: wrong-state: the channel is active, pause it first\n"
    assert not file.exists()


def test_a_refused_state_changes_nothing_and_has_a_reason(
    host: FakeHost, vmbus: Vmbus, tmp_path: Path
) -> None:
    file = tmp_path / "keeper.chunks"
    vmbus("pause", "keeper")
    vmbus("save", "keeper", str(file))
    data = bytearray(file.read_bytes())
    data[40] ^= 1
    file.write_bytes(data)
    status, out, err = vmbus("restore", "keeper", str(file), "--json")
    assert status == 1
    assert json.loads(out)["refusal"]["reason"] == "damaged"
    assert err.startswith("vmbus channel: damaged: the checksum")
    assert vmbus("start", "keeper")[0] == 0
    assert sorted(each for each in host.device.kept if each > 0) == [1, 3]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("pause", "nonsense"), "there is no channel 'nonsense'; there are keeper"),
        (("restore", "keeper", "/nowhere"), "/nowhere cannot be read: No such file or directory"),
        (("save", "keeper", "/"), "cannot be written to /: Is a directory"),
    ],
)
def test_what_is_wrong_is_one_sentence(vmbus: Vmbus, words: tuple[str, ...], told: str) -> None:
    vmbus("pause", "keeper")
    status, _, err = vmbus(*words)
    assert status == 1
    assert told in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("words", [("--buffer", "many"), ("--buffer", "1T"), ("--timeout", "nan")])
def test_numbers_are_checked(vmbus: Vmbus, words: tuple[str, ...]) -> None:
    try:
        status = vmbus("save", "keeper", "/dev/null", *words)[0]
    except SystemExit as error:
        status = cast("int", error.code)
    assert status == 2


def test_work_under_way_is_waited_for_and_not_for_ever(host: FakeHost, vmbus: Vmbus) -> None:
    host.device.looks = 3
    assert vmbus("pause", "keeper")[0] == 0
    assert host.device.looks < 0
    host.device.looks = 1 << 30
    status, out, err = vmbus("save", "keeper", "/dev/null", "--timeout", "0.02")
    assert (status, out) == (1, "")
    assert "still has work under way after 0.02 s" in err


@pytest.mark.parametrize("phase", [each for each in Phase if each is not Phase.IDLE])
def test_nothing_is_changed_during_a_migration(host: FakeHost, vmbus: Vmbus, phase: Phase) -> None:
    host.migration.phase = phase
    for words in (("pause", "keeper"), ("start", "keeper"), ("save", "keeper", "/dev/null")):
        status, _, err = vmbus(*words)
        assert (status, "try again afterwards" in err) == (1, True)
    assert vmbus("list")[0] == 0


async def test_a_descriptor_that_is_no_file_is_refused(host: FakeHost) -> None:
    request = {"action": "restore", "channel": "keeper", "descriptors": ()}
    with pytest.raises(UserError, match="descriptor of a regular file"):
        await verb.answer(cast("Host", host), request)
    with pytest.raises(UserError, match="known: list, pause, restore, save, start"):
        await verb.answer(cast("Host", host), {"action": "grow"})
