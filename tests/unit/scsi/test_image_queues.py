"""When an image's server has a queue, and what becomes of it: with a server and an engine of the test."""

from __future__ import annotations

import socket
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from vmbus.errors import DeviceError
from vmbus.ports import QueueLayout
from vmbus_devices.scsi import image_queues
from vmbus_devices.scsi.image_queues import ImageQueues


class Queue:
    """A queue that notes what happens to it."""

    def __init__(self, number: int) -> None:
        self.layout = QueueLayout((), 1024, 0, 0, 0, -1, -1)
        self.number = number
        self.closed = False
        self.broken: Callable[[str], None] = lambda why: None

    def open(self, broken: Callable[[str], None]) -> int:
        self.broken = broken
        return self.number

    def activity(self) -> tuple[int, int]:
        return 5, 2

    def oldest(self) -> float | None:
        return 10.0

    def overtaken(self) -> float | None:
        return 20.0

    def close(self) -> None:
        self.closed = True


class Bench:
    """The machine around a back end's queues."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, writethrough: bool = False) -> None:
        self.queues_made: list[Queue] = []
        self.number = 7
        self.refusal: Exception | None = None
        self.watched: list[Callable[[], None]] = []
        self.errors: list[Exception] = []
        self.user = SimpleNamespace(queue=0, leaves_fua=False, flush_needed=True)
        self.queues = ImageQueues(self.user, writethrough=writethrough)
        self.queues.lost = self.errors.append
        workers: Any = SimpleNamespace(watch=self._watch)
        self.queues.workers = workers
        monkeypatch.setattr(image_queues, "offer_queue", self._offer)
        monkeypatch.delenv("VMBUS_FASTPATH", raising=False)
        self.native: Any = SimpleNamespace(data_path=SimpleNamespace(make_queue=self._make))

    def _make(self) -> Queue:
        self.queues_made.append(Queue(self.number))
        return self.queues_made[-1]

    def _watch(self, fd: int, readable: Callable[[], None]) -> Callable[[], None]:
        self.watched.append(readable)
        return lambda: None

    def _offer(self, stream: socket.socket, layout: QueueLayout, timeout: float) -> None:
        if self.refusal is not None:
            raise self.refusal

    def session(self) -> socket.socket:
        here, there = socket.socketpair()
        self.queues.begin(here)
        return there

    def end(self, *, clean: bool = True) -> None:
        self.queues.end()
        assert self.user.queue == 0
        self.queues.close(clean=clean)


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Bench:
    bench = Bench(monkeypatch)
    bench.queues.use_native(bench.native)
    return bench


def test_each_session_has_a_queue_of_its_own(bench: Bench) -> None:
    for number in (7, 8):
        bench.number = number
        assert bench.queues.wanted
        with bench.session():
            assert (bench.user.queue, bench.user.leaves_fua) == (number, True)
            assert bench.queues.activity() == (5, 2)
            assert (bench.queues.oldest(), bench.queues.overtaken()) == (10.0, 20.0)
            bench.end()
    assert [each.closed for each in bench.queues_made] == [True, True]
    assert bench.queues.activity() == (0, 0)
    assert (bench.queues.oldest(), bench.queues.overtaken()) == (None, None)


def test_the_queue_is_not_used_before_its_server_has_ended_and_not_closed_before(bench: Bench) -> None:
    with bench.session():
        bench.queues.end()
        assert bench.user.queue == 0
        assert not bench.queues_made[0].closed
        bench.queues.close(clean=True)
        assert bench.queues_made[0].closed


@pytest.mark.parametrize("flush_needed", [True, False])
@pytest.mark.parametrize("writethrough", [True, False])
def test_fua_needs_nothing_where_each_write_is_safe_or_none_has_to_be(
    monkeypatch: pytest.MonkeyPatch, writethrough: bool, flush_needed: bool
) -> None:
    bench = Bench(monkeypatch, writethrough=writethrough)
    bench.queues.use_native(bench.native)
    bench.user.flush_needed = flush_needed
    with bench.session():
        assert bench.user.leaves_fua == (flush_needed and not writethrough)
        bench.end()


@pytest.mark.parametrize("way", ["off", "nbd"])
def test_the_environment_forbids_queues(monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    bench = Bench(monkeypatch)
    monkeypatch.setenv("VMBUS_FASTPATH", way)
    bench.queues.use_native(bench.native)
    assert not bench.queues.wanted


def test_a_value_that_is_not_known_forbids_nothing_and_is_named(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    bench = Bench(monkeypatch)
    monkeypatch.setenv("VMBUS_FASTPATH", "turns")
    bench.queues.use_native(bench.native)
    assert bench.queues.wanted
    assert "VMBUS_FASTPATH=turns has no effect: set nbd (" in caplog.text


def test_a_machine_without_an_engine_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(monkeypatch)
    bench.native.data_path = None
    bench.queues.use_native(bench.native)
    assert not bench.queues.wanted


@pytest.mark.parametrize("refusal", [DeviceError("no"), ConnectionResetError("gone")])
def test_a_server_that_refuses_is_not_asked_again(bench: Bench, refusal: Exception) -> None:
    bench.refusal = refusal
    with bench.session():
        assert bench.user.queue == 0
        bench.end()
    assert not bench.queues.wanted
    assert bench.queues_made[0].closed


def test_a_server_without_such_an_export_is_not_asked_again(bench: Bench) -> None:
    bench.queues.begin(None)
    bench.end()
    assert not bench.queues.wanted


def test_too_many_queues_are_no_harm(bench: Bench) -> None:
    bench.number = 0
    with bench.session():
        assert bench.user.queue == 0
        bench.end()
    assert not bench.queues.wanted


def test_a_server_that_breaks_the_rules_is_given_up_and_its_successor_has_no_queue(bench: Bench) -> None:
    with bench.session():
        bench.queues_made[0].broken("it lies")
        assert [str(each) for each in bench.errors] == [
            "the storage daemon breaks the rules of its queue: it lies"
        ]
        bench.end(clean=False)
    assert not bench.queues.wanted


def test_a_queue_that_is_given_up_has_no_successor(bench: Bench) -> None:
    with bench.session():
        bench.queues.give_up("it leaves out a request")
        bench.end()
    assert not bench.queues.wanted


@pytest.mark.parametrize(("clean", "wanted"), [(False, True), (True, False)], ids=["died", "goes on"])
def test_the_end_of_the_connection_is_the_end_of_the_session(bench: Bench, clean: bool, wanted: bool) -> None:
    """A daemon that died gets a successor with a queue; one that only closed the queue does not get another."""
    with bench.session():
        bench.watched[0]()
        assert "closed its queue" in str(bench.errors[0])
        bench.end(clean=clean)
    assert bench.queues.wanted == wanted
