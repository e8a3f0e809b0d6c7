"""Finding devices by entry point, and the text after ``--device``."""

from __future__ import annotations

import enum
import sys
import tomllib
import types
import uuid
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Annotated, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from vmbus.bus.io.device import Device
from vmbus.bus.offers import Offer
from vmbus.devices.line import split_device
from vmbus.devices.options import Help, options_of
from vmbus.devices.registry import GROUP, Registry
from vmbus.errors import DeviceError, UsageError
from vmbus_devices.echo import Echo
from vmbus_devices.heartbeat import Heartbeat
from vmbus_devices.scsi import Scsi
from vmbus_devices.scsi.fast.build import LIBRARY
from vmbus_devices.shutdown import Shutdown
from vmbus_devices.timesync import TimeSync

PYPROJECT = Path(__file__).parents[3] / "pyproject.toml"


class Colour(enum.Enum):
    RED = "red"
    BLUE = "blue"


class Sample(Device):
    """A device with every kind of option.

    And a second paragraph.
    """

    name = "sample"

    def __init__(
        self,
        *,
        path: Annotated[Path, Help("where it is")],
        count: Annotated[int, Help("how many", least=1, most=8)] = 2,
        share: Annotated[float, Help("how much", least=0)] = 0.5,
        label: Annotated[str, Help("what it is called")] = "none",
        fast: Annotated[bool, Help("whether to hurry")] = True,
        colour: Annotated[Colour, Help("the colour")] = Colour.RED,
        instance: Annotated[uuid.UUID | None, Help("the GUID")] = None,
        offset: Annotated[int, Help("any number")] = 0,
        inner: int = 5,
    ) -> None:
        self.given = {key: value for key, value in locals().items() if key not in ("self", "__class__")}
        if label == "forbidden":
            raise UsageError("label=forbidden: choose another")
        if label == "broken":
            raise TypeError("oh")

    def offer(self) -> Offer:
        return Offer(interface_id=uuid.UUID(int=1), instance_id=uuid.UUID(int=2))

    def packet(self, io: Any, packet: Any) -> None:
        """Nothing."""


class Untyped(Device):
    """A device with an option of a type that no text can express."""

    name = "untyped"

    def __init__(self, *, table: Annotated[dict[str, int], Help("impossible")]) -> None:
        self.table = table

    offer = Sample.offer
    packet = Sample.packet


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> Registry:
    module = types.ModuleType("third_party_devices")
    module.Sample = Sample  # type: ignore[attr-defined]
    module.Untyped = Untyped  # type: ignore[attr-defined]
    module.number = 5  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "third_party_devices", module)
    values = {
        "sample": "third_party_devices:Sample",
        "untyped": "third_party_devices:Untyped",
        "number": "third_party_devices:number",
        "missing": "third_party_devices:Missing",
        "no-module": "third_party_nothing:Device",
        "echo": "vmbus_devices.echo:Echo",
        "heartbeat": "vmbus_devices.heartbeat:Heartbeat",
    }
    return Registry([EntryPoint(name, value, GROUP) for name, value in values.items()])


def test_devices_of_this_package_are_declared_and_load() -> None:
    declared = tomllib.loads(PYPROJECT.read_text())["project"]["entry-points"][GROUP]
    registry = Registry([EntryPoint(name, value, GROUP) for name, value in declared.items()])
    assert registry.names == ["echo", "heartbeat", "scsi", "shutdown", "timesync"]
    assert [registry.load(name) for name in registry.names] == [Echo, Heartbeat, Scsi, Shutdown, TimeSync]
    for name in registry.names:
        assert registry.create(name).name == name


def test_options_reach_the_device(registry: Registry) -> None:
    device = registry.create("heartbeat,interval=0.25")
    assert isinstance(device, Heartbeat)
    assert device.interval == 0.25
    instance = uuid.uuid4()
    echo = registry.create(f"echo,id=echo.2,instance={{{instance}}}")
    assert (echo.name, echo.offer().instance_id) == ("echo.2", instance)


def test_every_kind_of_value(registry: Registry) -> None:
    device = registry.create(
        "sample,path=/a,,b=c,count=0x8,share=1e3,label=,fast=off,colour=blue,"
        "instance=361fb128-28d1-4c0f-baf6-f5d6f82b002b,offset=-3"
    )
    assert isinstance(device, Sample)
    assert device.given == {
        "path": Path("/a,b=c"),
        "count": 8,
        "share": 1000.0,
        "label": "",
        "fast": False,
        "colour": Colour.BLUE,
        "instance": uuid.UUID("361fb128-28d1-4c0f-baf6-f5d6f82b002b"),
        "offset": -3,
        "inner": 5,
    }


def test_defaults_are_the_devices_own(registry: Registry) -> None:
    device = registry.create("sample,path=x")
    assert isinstance(device, Sample)
    assert device.given["instance"] is None
    assert (device.given["count"], device.given["colour"]) == (2, Colour.RED)
    assert device.name == "sample"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "a device name comes first"),
        (",path=x", "a device name comes first"),
        ("heartbaet", "Did you mean heartbeat?"),
        ("nothing-like-it", "There are: echo, heartbeat, missing"),
        ("sample", "path= is missing"),
        ("sample,path", "'path' is not key=value"),
        ("sample,", "'' is not key=value"),
        ("sample,=x", "'=x' is not key=value"),
        ("sample,path=a,b", "a comma inside a value is written ,,"),
        ("sample,path=x,path=y", "path is given twice"),
        ("sample,path=x,speed=3", "no option 'speed'"),
        ("sample,path=x,inner=3", "no option 'inner'"),
        ("sample,path=x,speed=3", "count=<integer>  how many (default 2)"),
        ("sample,path=x,speed=3", "fast=<on|off>  whether to hurry (default on)"),
        ("sample,path=x,count=two", "count=two: expected integer"),
        ("sample,path=x,count=9", "count=9: expected integer from 1 to 8"),
        ("sample,path=x,share=-1", "share=-1: expected number of at least 0"),
        ("sample,path=x,share=nan", "share=nan: expected number"),
        ("sample,path=x,share=inf", "share=inf: expected number"),
        ("sample,path=x,fast=yes", "fast=yes: expected on|off"),
        ("sample,path=x,colour=green", "colour=green: expected red|blue"),
        ("sample,path=x,instance=12", "instance=12: expected GUID"),
        ("sample,path=x,label=forbidden", "choose another"),
        ("sample,path=x,id=", "id="),
        ("sample,path=x,id=a b", "id=a b"),
    ],
)
def test_mistakes_say_what_is_allowed(registry: Registry, text: str, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        registry.create(text)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("missing", "does not load"),
        ("no-module", "does not load"),
        ("number", "not a class derived from Device"),
        ("untyped,table=x", "no option can be of type"),
        ("sample,path=x,label=broken", "cannot be created"),
    ],
)
def test_broken_packages_are_not_the_users_fault(registry: Registry, text: str, message: str) -> None:
    with pytest.raises(DeviceError) as caught:
        registry.create(text)
    assert message in str(caught.value)


def test_one_name_in_two_packages_is_refused() -> None:
    entries = [EntryPoint("echo", value, GROUP) for value in ("a:Echo", "b:Echo", "a:Echo")]
    with pytest.raises(DeviceError, match="a:Echo, b:Echo"):
        Registry(entries).load("echo")


def test_help_lists_devices_and_options(registry: Registry) -> None:
    listing = registry.help()
    assert "sample       A device with every kind of option.\n" in listing
    assert "missing      (broken: " in listing
    assert registry.help("sample").splitlines()[:3] == [
        "Options of sample:",
        "  id=<text>  the name of this device, for two of a kind",
        "  path=<file>  where it is (required)",
    ]
    assert "colour=<red|blue>  the colour (default red)" in registry.help("sample")


def test_installed_packages_are_asked_by_default() -> None:
    assert isinstance(Registry().names, list)


def test_parameters_without_help_are_no_options() -> None:
    assert [option.key for option in options_of(Heartbeat)] == ["interval"]
    assert [option.key for option in options_of(Shutdown)] == []


@given(
    name=st.text("abc-", min_size=1),
    values=st.dictionaries(st.text("abc", min_size=1), st.text(st.characters(exclude_characters="\0"))),
)
def test_escaped_text_comes_back(name: str, values: dict[str, str]) -> None:
    text = name + "".join(f",{key}={value.replace(',', ',,')}" for key, value in values.items())
    assert split_device(text) == (name, values)


# --- compiled code ---


class Compiled(Sample):
    """A device with a library of its own."""

    native_libraries = (LIBRARY,)


def test_setup_finds_the_libraries_of_installed_devices_each_once() -> None:
    found = Registry(
        [
            EntryPoint("compiled", f"{__name__}:Compiled", GROUP),
            EntryPoint("scsi", "vmbus_devices.scsi:Scsi", GROUP),
            EntryPoint("sample", f"{__name__}:Sample", GROUP),
        ]
    )
    assert found.native_libraries() == [LIBRARY]
    assert LIBRARY.name_in_reports == "fast path"
    assert LIBRARY in Registry().native_libraries()


def test_a_device_that_does_not_load_has_no_libraries_and_is_named_in_the_log(
    caplog: pytest.LogCaptureFixture,
) -> None:
    broken = EntryPoint("broken", "vmbus_devices.nowhere:Nothing", GROUP)
    assert Registry([broken]).native_libraries() == []
    assert "broken" in caplog.text
