"""The walk in docs/devices.md works as it stands."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from vmbus.bus.io.device import Device
from vmbus.devices.options import options_of
from vmbus.devices.registry import Registry
from vmbus.errors import DeviceError
from vmbus.wire import echo

DOCUMENT = Path(__file__).parents[3] / "docs" / "devices.md"


@pytest.fixture(scope="module")
def names() -> dict[str, Any]:
    blocks = re.findall(r"^```python\n(.*?)^```", DOCUMENT.read_text(), re.DOTALL | re.MULTILINE)
    assert len(blocks) == 4
    namespace: dict[str, Any] = {"__name__": "walk"}
    source = "\n".join(blocks).replace("from __future__ import annotations\n", "")
    exec(compile(source, str(DOCUMENT), "exec", dont_inherit=True), namespace)
    return namespace


def test_the_test_of_the_walk_passes(names: dict[str, Any]) -> None:
    names["test_adder"]()


def test_the_options_of_the_walk(names: dict[str, Any]) -> None:
    assert [option.key for option in options_of(names["SavedAdder"])] == ["start"]
    assert names["SavedAdder"](start=7).sum == 7


def test_the_state_of_the_walk(names: dict[str, Any]) -> None:
    adder: Device = names["SavedAdder"](start=9)
    later: Device = names["SavedAdder"]()
    later.restore(adder.save())
    assert later.status() == {"sum": 9}
    with pytest.raises(DeviceError):
        later.restore(adder.save()[:-1])


def test_guids_and_options_in_the_table_are_the_real_ones() -> None:
    text = DOCUMENT.read_text()
    assert str(echo.ECHO_INTERFACE) in text
    assert str(echo.ECHO_INSTANCE) in text
    registry = Registry()
    for name in registry.names:
        row = next(line for line in text.splitlines() if line.startswith(f"| `{name}`"))
        assert set(re.findall(r"`(\w+)=", row)) == {option.key for option in options_of(registry.load(name))}
