"""Signals and GPADLs of a channel, each alone: they need a context, and no channel."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import cast

import pytest
from vmbus.bus.channel.context import ChannelContext
from vmbus.bus.channel.endpoint import Outcome
from vmbus.bus.channel.gpadl import GpadlAssembler, GpadlState
from vmbus.bus.channel.gpadl_list import GpadlList
from vmbus.bus.channel.opening import OpenRequest
from vmbus.bus.channel.signals import ChannelSignals
from vmbus.bus.channel.state import ChannelCounters
from vmbus.bus.contact import Connection
from vmbus.errors import DeviceError
from vmbus.refusals import Refusals
from vmbus.testing.fakes import FakeMemory, FakeSynic, FakeTimers
from vmbus.testing.scripted import parse_host_message
from vmbus.wire.gpadl import GPADL_HEADER, GpadlTorndown, GpaRange, split_gpadl
from vmbus.wire.header import STATUS_SUCCESS, STATUS_UNSUCCESSFUL
from vmbus.wire.messages import ModifyChannelResponse
from vmbus.wire.version import Version

PAGE = 4096


class Context:
    """A context of channel 3 that records the answers and the calls of the endpoint."""

    relid = 3

    def __init__(self) -> None:
        memory = FakeMemory(1 << 20)
        self.host = SimpleNamespace(
            memory=memory,
            synic=FakeSynic(2),
            timers=FakeTimers(),
            connection=Connection(version=Version.IRON),
            gpadl_assembler=GpadlAssembler(memory),
        )
        self.counters = ChannelCounters()
        self.refusals = Refusals("channel", logging.getLogger(__name__))
        self.calls = self
        self.deferred = False
        self.called: list[str] = []
        self.answers: list[object] = []

    def answer(self, payload: bytes, target: object = None) -> None:
        self.answers.append(parse_host_message(payload)[1])

    def retargeted(self, vp: int) -> None:
        self.called.append(f"retargeted {vp}")

    def gpadl_created(self, gpadl: object) -> Outcome:
        self.called.append("created")
        return Outcome(None, False)

    def gpadl_torn_down(self, gpadl: object) -> Outcome:
        self.called.append("torn down")
        return Outcome(None, self.deferred)

    def finish(self, name: str) -> bool:
        return True

    def as_context(self) -> ChannelContext:
        return cast("ChannelContext", self)


@pytest.fixture
def context() -> Context:
    return Context()


def test_the_guest_is_signalled_only_between_connect_and_close(context: Context) -> None:
    signals = ChannelSignals(context.as_context())
    signals.target_vp = 1
    signals.signal_guest()
    signals.connect(3, OpenRequest(0, 1, 1, 4, event_flag=9), lambda: None)
    signals.signal_guest()
    signals.close()
    signals.signal_guest()
    assert context.host.synic.events == [(1, 2, 9)]
    assert (context.counters.interrupts, context.counters.interrupts_dropped) == (1, 2)


def test_a_modification_that_waits_fails_with_the_close(context: Context) -> None:
    signals = ChannelSignals(context.as_context())
    signals.target_vp = 0
    signals.modify(1, paused=True)
    signals.apply_pending_target()
    signals.modify(0, paused=True)
    signals.disconnect()
    assert context.called == ["retargeted 1"]
    assert context.answers == [
        ModifyChannelResponse(3, STATUS_SUCCESS),
        ModifyChannelResponse(3, STATUS_UNSUCCESSFUL),
    ]


def test_a_gpadl_is_answered_and_refunded_when_the_endpoint_gives_it_back(context: Context) -> None:
    returned: list[None] = []
    gpadls = GpadlList(context.as_context(), lambda: returned.append(None))
    assembler = context.host.gpadl_assembler
    (message,) = split_gpadl(3, 7, [GpaRange(PAGE, 0, [context.host.memory.base // PAGE])])
    assembly = assembler.begin(GPADL_HEADER.parse(message), message[GPADL_HEADER.size :])
    assert gpadls.accept(assembly, notify_device=True) is None
    gpadl = gpadls.by_id[7]
    with pytest.raises(DeviceError):
        gpadls.finish_teardown(gpadl)
    gpadl.state, context.deferred = GpadlState.TEARING_DOWN, True
    gpadls.continue_teardowns()
    assert (context.called, context.answers, gpadls.all_returned) == (["created", "torn down"], [], False)
    gpadls.finish_teardown(gpadl)
    assert (context.answers, gpadls.by_id, gpadls.all_returned) == ([GpadlTorndown(7)], {}, True)
    assert (assembler.quota.gpadls, assembler.quota.pages, len(returned)) == (0, 0, 1)
