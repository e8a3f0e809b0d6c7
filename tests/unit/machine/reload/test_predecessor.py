"""The hand-over of a guest: until the next process has it, this one serves it again after a failure of any step."""

from __future__ import annotations

import asyncio
import errno
import os
import select
import socket
import tempfile
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import pytest
from vmbus.errors import InternalError, QemuGone
from vmbus.machine.host import Host
from vmbus.machine.reload import predecessor
from vmbus.machine.reload.link import Link, ReloadFailed
from vmbus.machine.reload.predecessor import Handover

SERVED_AGAIN = ["gateway back", "clock", "state", "devices", "serve", "qmp"]


class Handing:
    """A guest that is handed over. ``did``: what was done to its host since nobody served it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, running: bool = True) -> None:
        self.did: list[str] = []
        self.fails: dict[str, Exception] = {}
        self.ended_raises: Exception | None = None
        here, there = socket.socketpair()
        self.link, self.there = Link(here, "the new emulator"), Link(there, "the old one")
        self.file = tempfile.TemporaryFile()  # noqa: SIM115 - closed in `close`
        number = self.file.fileno()
        monkeypatch.setattr(predecessor, "figures", lambda host: {})
        self.host = SimpleNamespace(
            stopped=not running,
            leave_gateway=self._step("leave"),
            give_gateway=self._step("give"),
            take_gateway_back=self._step("gateway back"),
            begin_service=self._step("serve"),
            devices_resumed=self._step("devices"),
            clock=SimpleNamespace(resume=self._step("clock"), stopped_at=0),
            workers=SimpleNamespace(settle=self._settle),
            qmp=SimpleNamespace(
                pause=self._pause, resume=self._step("qmp"), path="qmp", pid=1, fileno=lambda: number
            ),
            qtest=SimpleNamespace(settled=self._settled, fileno=lambda: number),
            gateway=SimpleNamespace(size=4096, descriptors=lambda: (number, number, number)),
            state=SimpleNamespace(
                pause_channels=self._pause_channels,
                pause=lambda: None,
                save=lambda **options: SimpleNamespace(data=b"state"),
                release_devices=self._step("release"),
                resume=self._step("state"),
            ),
        )

    def _step(self, name: str) -> Callable[[], None]:
        def step() -> None:
            self.did.append(name)
            if name in self.fails:
                raise self.fails[name]

        return step

    def _pause_channels(self) -> None:
        self.host.stopped = True

    async def _pause(self) -> bytes:
        if "pause" in self.fails:
            raise self.fails["pause"]
        return b""

    async def _settle(self, timeout: float) -> bool:
        return True

    async def _settled(self) -> None:
        if "settled" in self.fails:
            raise self.fails["settled"]

    async def _ended(self) -> str:
        self.did.append("ended")
        with pytest.raises(OSError):
            os.fstat(self.link.fileno())  # the link was closed, so that the process knows
        if self.ended_raises is not None:
            raise self.ended_raises
        return "process 7 ended"

    def begin(self) -> asyncio.Task[float]:
        return asyncio.ensure_future(Handover(cast("Host", self.host), self.link, self._ended, ()).run())

    async def take(self) -> None:
        """The new process's part, until it has locked the images."""
        for number in (await self.there.hear("state")).descriptors:
            os.close(number)
        await self.there.tell("accepted")
        await self.there.hear("go")
        await self.there.tell("claimed")

    def close(self) -> None:
        self.link.close()
        self.there.close()
        self.file.close()


@pytest.fixture
def guest(monkeypatch: pytest.MonkeyPatch) -> Any:
    found = Handing(monkeypatch)
    yield found
    found.close()


async def test_a_guest_is_handed_over_when_the_next_process_has_read_that_it_is_its_own(
    guest: Handing,
) -> None:
    handed = guest.begin()
    await guest.take()
    await asyncio.sleep(0)
    assert not handed.done()
    await guest.there.hear("yours")
    assert not handed.done()
    guest.there.close()
    assert 0 < await handed < 30
    assert guest.did == ["leave", "release", "give"]


async def test_a_process_that_leaves_a_copy_of_its_link_has_the_guest_all_the_same(guest: Handing) -> None:
    """Of which a device has started another process, by a plain fork."""
    copy = os.dup(guest.there.fileno())
    handed = guest.begin()
    await guest.take()
    await guest.there.hear("yours")
    guest.there.leave()
    async with asyncio.timeout(30):
        await handed
    os.close(copy)


async def test_a_process_that_ends_without_having_read_that_does_not_have_the_guest(guest: Handing) -> None:
    handed = guest.begin()
    await guest.take()
    await asyncio.get_running_loop().run_in_executor(None, _readable, guest.there.fileno())
    guest.there.close()
    with pytest.raises(ReloadFailed, match="the new emulator ended"):
        await handed
    assert guest.did == ["leave", "release", "give", "ended", *SERVED_AGAIN]


async def test_a_process_that_ends_before_it_can_be_told_does_not_have_the_guest(guest: Handing) -> None:
    handed = guest.begin()
    await guest.take()
    guest.there.close()
    with pytest.raises(ReloadFailed, match="the new emulator ended"):
        await handed
    assert guest.did == ["leave", "release", "give", "ended", *SERVED_AGAIN]


async def test_a_process_that_refuses_in_the_end_does_not_have_the_guest(guest: Handing) -> None:
    handed = guest.begin()
    await guest.take()
    await guest.there.refuse("there is no room")
    with pytest.raises(ReloadFailed, match=r"^there is no room$"):
        await handed
    assert guest.did[-len(SERVED_AGAIN) :] == SERVED_AGAIN


@pytest.mark.parametrize(
    "error", [QemuGone("QEMU closed its QMP socket"), InternalError("a bug"), OSError(24, "x")]
)
async def test_a_monitor_that_cannot_be_left_leaves_the_guest_served(
    guest: Handing, error: Exception
) -> None:
    guest.fails["pause"] = error
    with pytest.raises(type(error)):
        await guest.begin()
    assert guest.did == ["leave", "ended", "gateway back", "state", "serve", "qmp"]


@pytest.mark.parametrize("step", ["settled", "release", "give"])
async def test_a_step_that_fails_leaves_the_guest_served(guest: Handing, step: str) -> None:
    guest.fails[step] = OSError(errno.EMFILE, "Too many open files")
    handed = guest.begin()
    taking = asyncio.ensure_future(guest.take())
    with pytest.raises(OSError, match="Too many"):
        await handed
    assert guest.did[-len(SERVED_AGAIN) :] == SERVED_AGAIN
    await asyncio.gather(taking, return_exceptions=True)


async def test_a_stopped_guest_stays_stopped_after_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    guest = Handing(monkeypatch, running=False)
    guest.fails["settled"] = ReloadFailed("x")
    with pytest.raises(ReloadFailed):
        await guest.begin()
    assert guest.did == ["leave", "ended", "gateway back", "state", "serve", "qmp"]
    guest.close()


async def test_a_process_whose_end_is_not_known_does_not_keep_the_guest_from_being_served(
    guest: Handing, caplog: pytest.LogCaptureFixture
) -> None:
    guest.fails["settled"] = ReloadFailed("the first failure")
    guest.ended_raises = ReloadFailed("the keeper ended")
    with pytest.raises(ReloadFailed, match="the first failure"):
        await guest.begin()
    assert guest.did == ["leave", "ended", *SERVED_AGAIN]
    assert "the keeper ended" in caplog.text


def _readable(descriptor: int) -> None:
    assert select.select([descriptor], [], [], 30)[0]
