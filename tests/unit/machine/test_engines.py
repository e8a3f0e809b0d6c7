"""Engines of devices with compiled code: one for each machine, counted as work, closed with it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, Self

from vmbus.machine.io.engines import NativeEngines
from vmbus.ports import NativeServices


class Engine:
    def __init__(self) -> None:
        self.in_flight = 0
        self.calls: list[Any] = []

    @classmethod
    def open(cls, services: NativeServices) -> Self | None:
        return cls()

    @classmethod
    def impossible(cls, services: NativeServices) -> Self | None:
        return None

    def close(self) -> None:
        self.calls.append("close")


class Path(Engine):
    """A data path."""

    def report_ranges(self, on: bool) -> None:
        self.calls.append(on)

    def leave_gateway(self) -> None:
        self.calls.append("leave")

    def return_to_gateway(self) -> None:
        self.calls.append("return")


class Other(Engine):
    """Another device's."""


def engines(path: Any = None) -> NativeEngines:
    nothing: Any = SimpleNamespace()
    return NativeEngines(nothing, lambda: path)


def test_devices_of_a_kind_share_one_engine() -> None:
    opened = engines()
    first = opened.engine(Engine.open)
    assert first is not None
    assert opened.engine(Engine.open) is first
    assert opened.engine(Other.open) is not first


def test_an_engine_that_cannot_be_opened_is_not_tried_again() -> None:
    tries: list[NativeServices] = []

    def refuse(services: NativeServices) -> Engine | None:
        tries.append(services)
        return None

    opened = engines()
    assert opened.engine(refuse) is None
    assert opened.engine(refuse) is None
    assert tries == [opened]
    assert opened.in_flight == 0


def test_transfers_of_all_engines_count() -> None:
    opened = engines()
    one, two = opened.engine(Engine.open), opened.engine(Other.open)
    assert one is not None
    assert two is not None
    one.in_flight, two.in_flight = 2, 3
    assert opened.in_flight == 5


def test_ranges_are_reported_by_a_data_path_that_is_started_before_or_during_a_migration() -> None:
    for first in (True, False):
        path = Path()
        opened = engines(path)
        if first:
            assert opened.data_path
        opened.report_ranges(True)
        assert opened.data_path
        opened.report_ranges(False)
        assert path.calls == ([False] if first else []) + [True, False]


def test_all_engines_are_closed() -> None:
    opened = engines()
    both = [opened.engine(Engine.open), opened.engine(Other.open)]
    opened.close()
    assert [each.calls for each in both if each is not None] == [["close"], ["close"]]
    assert opened.in_flight == 0


def test_a_data_path_leaves_the_gateway_and_returns_and_none_is_started_meanwhile() -> None:
    path = Path()
    opened = engines(path)
    opened.return_to_gateway()  # it was not left
    opened.leave_gateway()
    assert opened.data_path is None
    opened.return_to_gateway()
    assert opened.data_path is path
    opened.leave_gateway()
    assert opened.data_path is path
    opened.return_to_gateway()
    opened.return_to_gateway()
    assert path.calls == [False, "leave", "return"]
