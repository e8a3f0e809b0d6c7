"""The bus's and the hypervisor's part of a saved state: nothing is lost on the way through bytes."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from vmbus.bus.channel.opening import OpenRequest, ReservedClient
from vmbus.bus.channel.state import ChannelState
from vmbus.bus.contact import ContactRequest, MonitorPages, NextAction, Phase
from vmbus.bus.outbox import Outgoing, Target
from vmbus.bus.saved_state.layout import SAVED_BUS
from vmbus.bus.saved_state.values import (
    AssemblyRecord,
    BusState,
    ChannelRecord,
    ConnectionRecord,
    GpadlRecord,
    RangeRecord,
    WaitingMessage,
)
from vmbus.errors import MalformedError
from vmbus.hypervisor.saved_state.values import (
    PageState,
    PartitionState,
    QueuedMessage,
    ReferenceTimeState,
    TimerState,
    VpState,
)
from vmbus.machine.migration.hypervisor_layout import SAVED_HYPERVISOR, SavedAnswer, SavedHypervisor
from vmbus.wire.saved import parse_record
from vmbus.wire.version import Feature, Version

u8, u16, u32, u64 = (st.integers(0, (1 << bits) - 1) for bits in (8, 16, 32, 64))
flag = st.booleans()
blob = st.binary(max_size=60)
features = st.integers(0, 255).map(Feature)
versions = st.sampled_from(list(Version))


def some(of: st.SearchStrategy[Any], most: int = 3) -> st.SearchStrategy[tuple[Any, ...]]:
    return st.lists(of, max_size=most).map(tuple)


def exactly(count: int, of: st.SearchStrategy[Any]) -> st.SearchStrategy[tuple[Any, ...]]:
    return st.lists(of, min_size=count, max_size=count).map(tuple)


targets = st.builds(Target, u32, u8)
contacts = st.builds(
    ContactRequest,
    version=u32,
    target=targets,
    vtl=u8,
    features=u32.map(Feature),
    interrupt_page=u64,
    parent_to_child=u64,
    child_to_parent=u64,
    client_id=st.none() | st.uuids(),
    trusted=flag,
)
connections = st.builds(
    ConnectionRecord,
    st.sampled_from(list(Phase)),
    st.none() | versions,
    features,
    targets,
    u64,
    st.none() | st.builds(MonitorPages, u64, u64),
    st.none() | st.uuids(),
    flag,
    flag,
    flag,
    st.sampled_from(list(NextAction)),
    st.none() | contacts,
)
requests = st.builds(
    OpenRequest,
    u32,
    u32,
    st.none() | u32,
    u32,
    blob,
    st.none() | u16,
    st.none() | u32,
    flag,
    st.none() | st.builds(ReservedClient, targets, versions, features),
)
gpadls = st.builds(
    GpadlRecord, u32, some(st.builds(RangeRecord, u32, u32, some(st.tuples(u64, u64)))), flag, flag
)
channels = st.builds(
    ChannelRecord,
    interface_id=st.uuids(),
    instance_id=st.uuids(),
    subchannel_index=u16,
    state=st.sampled_from(list(ChannelState)),
    relid=st.none() | u32,
    monitor_id=st.none() | u32,
    offered=flag,
    request=st.none() | requests,
    reopen=st.none() | requests,
    target_vp=st.none() | u32,
    pending_target=st.none() | u32,
    close_answer=st.none() | targets,
    revoking=flag,
    abandoned=flag,
    released_by_guest=flag,
    waiting=flag,
    gpadls=some(gpadls),
)
buses = st.builds(
    BusState,
    connections,
    some(channels),
    some(st.builds(AssemblyRecord, u32, u32, u32, u32, blob)),
    some(st.builds(WaitingMessage, u32, blob, flag)),
    some(st.builds(Outgoing, targets, blob, flag)),
)
pages = st.builds(PageState, u64, st.none() | u64)
vps = st.builds(
    VpState,
    u64,
    u64,
    pages,
    pages,
    exactly(16, u64),
    some(st.builds(QueuedMessage, u8, u32, blob, st.none() | u8, u64)),
    exactly(4, st.builds(TimerState, u64, u64, st.none() | u64)),
    some(st.tuples(u16, u16)),
)
partitions = st.builds(
    PartitionState,
    u64,
    u64,
    u64,
    u64,
    exactly(5, u64),
    st.builds(ReferenceTimeState, u64, u32, u64, u64, st.integers(-(1 << 64), 1 << 64)),
    some(vps),
)
hypervisors = st.builds(
    SavedHypervisor,
    some(st.text(max_size=20)),
    u64,
    u64,
    some(st.builds(SavedAnswer, exactly(11, u64), u32, u64)),
    partitions,
)


@given(buses)
@settings(deadline=None, max_examples=60)
def test_a_bus_is_the_same_after_bytes(state: BusState) -> None:
    assert parse_record(SAVED_BUS, SAVED_BUS.build(state)) == state


@given(hypervisors)
@settings(deadline=None, max_examples=60)
def test_a_hypervisor_part_is_the_same_after_bytes(state: SavedHypervisor) -> None:
    assert parse_record(SAVED_HYPERVISOR, SAVED_HYPERVISOR.build(state)) == state


@given(buses, st.data())
@settings(deadline=None, max_examples=60)
def test_a_damaged_bus_is_refused_or_another_bus(state: BusState, data: st.DataObject) -> None:
    built = bytearray(SAVED_BUS.build(state))
    at = data.draw(st.integers(0, len(built) - 1))
    built[at] ^= data.draw(st.integers(1, 255))
    try:
        found = parse_record(SAVED_BUS, bytes(built))
    except MalformedError:
        return
    assert found != state


def test_bytes_after_the_end_are_refused() -> None:
    state = BusState(
        ConnectionRecord(
            *(Phase.DISCONNECTED, None, Feature(0), Target(0, 2), 0, None, None),
            *(False, False, False, NextAction.NONE, None),
        )
    )
    with pytest.raises(MalformedError):
        parse_record(SAVED_BUS, SAVED_BUS.build(state) + b"\0")
