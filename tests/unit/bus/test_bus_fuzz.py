"""Noise as messages: nothing raises, nothing is left behind (the long run is ``tests/fuzz/bus_messages.py``)."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from vmbus.bus.channel.state import ChannelState
from vmbus.testing.scripted import RecordingEndpoint, ScriptedGuest, an_offer
from vmbus.wire.messages import MESSAGES
from vmbus.wire.version import ALL_FEATURES, Version


@pytest.fixture
def fuzz() -> ModuleType:
    """``tests/fuzz/bus_messages.py``, which is a program and in no package."""
    path = Path(__file__).parents[2] / "fuzz" / "bus_messages.py"
    specification = importlib.util.spec_from_file_location(path.stem, path)
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules[path.stem] = module
    specification.loader.exec_module(module)
    return module


@pytest.mark.parametrize("seed", range(3))
def test_some_thousand_messages_with_devices_and_moves(fuzz: ModuleType, seed: int) -> None:
    fuzzer = fuzz.Fuzzer(seed)
    fuzzer.run(10_000)
    assert fuzzer.answers > 1000
    assert fuzzer.moves > 2


numbered = st.builds(
    lambda number, body: number.to_bytes(4, "little") + bytes(4) + body,
    st.sampled_from([int(number) for number in MESSAGES] + [0, 30, 0xFFFFFFFF]),
    st.one_of(
        st.binary(max_size=232),
        st.lists(st.integers(0, 8).map(lambda number: number.to_bytes(4, "little")), max_size=58).map(
            b"".join
        ),
    ),
)
payloads = st.one_of(st.binary(max_size=300), numbered, numbered)


@settings(deadline=None, max_examples=300)
@given(
    st.lists(st.tuples(st.integers(0, 0xFFFFFF), payloads), max_size=40),
    st.sampled_from([None, Version.V1, Version.WIN10, Version.IRON, Version.COPPER]),
)
def test_noise_never_raises_and_leaves_nothing(
    posts: list[tuple[int, bytes]], version: Version | None
) -> None:
    guest = ScriptedGuest.on_fakes(supported_flags=ALL_FEATURES)
    endpoints = [RecordingEndpoint() for _ in range(3)]
    for number, endpoint in enumerate(endpoints):
        guest.bus.offer(an_offer(f"d{number}"), endpoint)
    if version is not None:
        guest.connect(version)
        guest.open_channel(1)
    for connection_id, payload in posts:
        guest.post(payload, connection_id=connection_id)
        guest.timers.advance(0.01)
    guest.take()
    guest.bus.status()
    guest.bus.reset()
    assert guest.bus.gpadl_assembler.quota.gpadls == guest.bus.gpadl_assembler.quota.pages == 0
    assert guest.bus.gpadl_assembler.assemblies == {}
    assert all(channel.state is ChannelState.RELEASED for channel in guest.bus.channels)
    assert not any(endpoint.is_open or endpoint.gpadls for endpoint in endpoints)
    assert set(guest.synic.ports) == {2, 3}
