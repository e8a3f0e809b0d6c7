"""The bus against a model of it that a person can check by reading.

Source: docs/protocol/messages.md#wrong-messages, docs/protocol/messages.md#channel-states.

Each step is one thing that a guest, a device or the host does; the model says exactly what the host must answer
to it. So each waiting call of the guest gets exactly one answer, and after an UNLOAD nothing is left.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from vmbus.bus.channel.channel import Channel
from vmbus.bus.channel.state import Busy, ChannelState
from vmbus.testing.scripted import RecordingEndpoint, ScriptedGuest, an_offer
from vmbus.wire.gpadl import GpadlCreated, GpadlTorndown, GpaRange, split_gpadl
from vmbus.wire.header import STATUS_SUCCESS, STATUS_UNSUCCESSFUL, MessageType
from vmbus.wire.messages import ModifyChannelResponse, OpenResult
from vmbus.wire.version import Version

VPS = 2
OK, BAD = STATUS_SUCCESS, STATUS_UNSUCCESSFUL

Said = tuple[MessageType, Any]
"""A message of the host: its number, and what is looked at in it."""


def rescind(relid: int) -> Said:
    return MessageType.RESCIND_CHANNELOFFER, relid


def torndown(gpadl_id: int) -> Said:
    return MessageType.GPADL_TORNDOWN, gpadl_id


def opened(relid: int, open_id: int, status: int) -> Said:
    return MessageType.OPENCHANNEL_RESULT, (relid, open_id, status)


UNLOADED: Said = (MessageType.UNLOAD_RESPONSE, None)


def said(guest: ScriptedGuest) -> list[Said]:
    """What the host said, in the model's form."""
    found: list[Said] = []
    for answer in guest.take():
        body: Any = None
        match answer.message:
            case GpadlCreated(relid, gpadl_id, status):
                body = (relid, gpadl_id, status)
            case GpadlTorndown(gpadl_id):
                body = gpadl_id
            case OpenResult(relid, open_id, status):
                body = (relid, open_id, status)
            case ModifyChannelResponse(relid, status):
                body = (relid, status)
            case _ if answer.number in (MessageType.OFFERCHANNEL, MessageType.RESCIND_CHANNELOFFER):
                body = answer.message.relid
            case _ if answer.number is MessageType.VERSION_RESPONSE:
                body = answer.message.supported
        found.append((answer.number, body))
    return found


@dataclass
class ModelChannel:
    """A channel that the guest has been offered."""

    state: str = "closed"
    gpadls: dict[int, str] = field(default_factory=dict)
    """``accepted`` or ``tearing``."""
    ring: int = 0
    reopen: tuple[int, int] | None = None
    """Open id and ring GPADL."""
    released: bool = False
    revoking: bool = False

    def end_teardowns(self) -> list[Said]:
        tearing = [gpadl_id for gpadl_id, state in self.gpadls.items() if state == "tearing"]
        for gpadl_id in tearing:
            del self.gpadls[gpadl_id]
        return [torndown(gpadl_id) for gpadl_id in tearing]


class BusModel(RuleBasedStateMachine):
    """One bus, its guest, and what the guest may expect."""

    def __init__(self) -> None:
        super().__init__()
        self.guest = ScriptedGuest.on_fakes(vp_count=VPS, memory_size=1 << 20)
        self.channels: list[Channel] = []
        self.model: dict[int, ModelChannel] = {}
        self.assemblies: dict[int, tuple[int, bytes]] = {}
        self.connected = False
        self.offers_sent = False
        self.version = Version.IRON
        self.after: list[Said] | None = None
        """What a disconnection that waits will say."""
        self.opens = 0
        self.steps = 0

    # --- helpers ---

    def now_and_then(self, every: int) -> bool:
        """What ends things is rare, so that the guest gets something done first."""
        return self.steps % every == every - 1

    def closing(self) -> list[Channel]:
        """Channels whose device has not closed yet."""
        return [each for each in self.guest.bus.channels if each.state.name.startswith("CLOSING")]

    def expect(self, wanted: list[Said]) -> None:
        found = said(self.guest)
        assert Counter(found) == Counter(wanted), f"{found} instead of {wanted}"

    def device(self, relid: int) -> Channel | None:
        return self.guest.bus.find(relid)

    def defers(self, relid: int) -> bool:
        channel = self.device(relid)
        return channel is not None and bool(getattr(channel.endpoint, "defer_close", False))

    def live(self, relid: int) -> ModelChannel | None:
        return self.model.get(relid) if self.connected else None

    def draw_relid(self, data: st.DataObject) -> int:
        """Of a channel that there is, mostly."""
        relid: int = data.draw(st.sampled_from([*self.model] * 4 + [1, 2, 3, 4]))
        return relid

    def draw_gpadl(self, data: st.DataObject, relid: int) -> int:
        """Of a GPADL that the channel has, mostly."""
        model = self.model.get(relid)
        gpadl: int = data.draw(st.sampled_from([*(model.gpadls if model else ())] * 4 + [1, 2, 3, 4]))
        return gpadl

    # --- the host's devices ---

    @initialize(slow=st.lists(st.booleans(), min_size=1, max_size=3))
    def first_devices(self, slow: list[bool]) -> None:
        for number, each in enumerate(slow):
            self.hot_add(number, each)
        self.disconnection("contact", Version.IRON)
        self.request_offers()

    @rule(number=st.integers(0, 4), slow=st.booleans())
    def hot_add(self, number: int, slow: bool) -> None:
        instance = number + 1
        present = any(channel.offer.instance_id.int == instance for channel in self.guest.bus.channels)
        if present:
            return
        endpoint = RecordingEndpoint()
        endpoint.defer_close = slow or number % 2 == 0
        channel = self.guest.bus.offer(an_offer(f"d{number}", instance=instance), endpoint)
        self.channels.append(channel)
        wanted: list[Said] = []
        if self.offers_sent:
            relid = min(set(range(1, 20)) - set(self.model))
            self.model[relid] = ModelChannel()
            wanted.append((MessageType.OFFERCHANNEL, relid))
        self.expect(wanted)

    @precondition(lambda self: self.guest.bus.channels and self.now_and_then(6))
    @rule(data=st.data())
    def hot_remove(self, data: st.DataObject) -> None:
        channel = data.draw(st.sampled_from(self.guest.bus.channels))
        relid = channel.relid
        self.guest.bus.revoke(channel)
        model = self.live(relid) if relid is not None else None
        wanted: list[Said] = []
        if model is not None and relid is not None and not model.revoking:
            model.revoking = True
            model.reopen = None
            if model.state in ("closing", "reopen") or (model.state == "open" and self.defers(relid)):
                model.state = "closing"
            else:
                wanted = self.rescind_now(relid, model)
        self.expect(wanted)

    def rescind_now(self, relid: int, model: ModelChannel) -> list[Said]:
        model.state = "revoked"
        return [*model.end_teardowns(), rescind(relid)]

    @precondition(lambda self: self.closing() and self.now_and_then(4))
    @rule(data=st.data())
    def finish_a_close(self, data: st.DataObject) -> None:
        channel = data.draw(st.sampled_from(self.closing()))
        relid = channel.relid
        assert relid is not None
        channel.finish_close()
        self.expect(self.closed(relid))

    def closed(self, relid: int) -> list[Said]:
        model = self.live(relid)
        if model is None:
            return self.disconnected()
        model.ring = 0
        if model.revoking:
            return self.rescind_now(relid, model)
        wanted = model.end_teardowns()
        if model.released:
            del self.model[relid]
            self.forget_assemblies(relid)
            return wanted
        model.state = "closed"
        if model.reopen is not None:
            (open_id, ring), model.reopen = model.reopen, None
            wanted += self.opening(relid, model, open_id, ring)
        return wanted

    # --- the connection ---

    def forget_assemblies(self, relid: int) -> None:
        self.assemblies = {key: each for key, each in self.assemblies.items() if each[0] != relid}

    def disconnect(self, then: list[Said]) -> list[Said]:
        """All devices close; what is said at once."""
        self.connected = self.offers_sent = False
        self.model.clear()
        self.assemblies.clear()
        self.after = then
        return self.disconnected()

    def disconnected(self) -> list[Said]:
        """What is said when the last device has closed."""
        if self.after is None or any(
            channel.state is not ChannelState.RELEASED for channel in self.guest.bus.channels
        ):
            return []
        wanted, self.after = self.after, None
        if wanted == [(MessageType.VERSION_RESPONSE, 1)]:
            self.connected = True
        return wanted

    @precondition(lambda self: not self.connected or self.now_and_then(12))
    @rule(
        how=st.sampled_from(["contact", "contact", "unknown contact", "unload", "reset"]),
        version=st.sampled_from([Version.WIN10, Version.WIN10_RS5, Version.IRON, Version.COPPER]),
    )
    def disconnection(self, how: str, version: Version) -> None:
        self.guest.answers.clear()
        wanted: list[Said] = []
        match how:
            case "contact":
                self.guest.contact(version)
                self.version = version
                wanted = [(MessageType.VERSION_RESPONSE, 1)]
            case "unknown contact":
                self.guest.contact(0x00050004, connection_id=1)
                wanted = [(MessageType.VERSION_RESPONSE, 0)]
            case "unload":
                self.guest.unload()
                wanted = [UNLOADED]
            case "reset":
                self.guest.bus.reset()
        found = [(answer.number, getattr(answer.message, "supported", None)) for answer in self.guest.answers]
        assert found == self.disconnect(wanted)
        assert self.guest.bus.gpadl_assembler.assemblies == {}

    @precondition(lambda self: not self.offers_sent or self.now_and_then(12))
    @rule()
    def request_offers(self) -> None:
        wanted: list[Said] = []
        if self.connected and not self.offers_sent:
            self.offers_sent = True
            self.model = {number + 1: ModelChannel() for number in range(len(self.guest.bus.channels))}
            wanted = [(MessageType.OFFERCHANNEL, relid) for relid in self.model]
            wanted.append((MessageType.ALLOFFERS_DELIVERED, None))
        self.guest.post(b"\x03" + bytes(7))
        self.expect(wanted)

    @precondition(lambda self: self.now_and_then(7))
    @rule()
    def save_and_restore(self) -> None:
        """Nothing that the guest waits for is lost or repeated; devices that were leaving have left."""
        old = [channel for channel in self.guest.bus.channels if not channel.revoking]
        state = self.guest.save()
        self.guest.bus = self.guest.another_bus()
        self.guest.bus.restore(state)
        self.channels = []
        for each in old:
            endpoint = RecordingEndpoint()
            endpoint.defer_close = each.endpoint.defer_close  # type: ignore[attr-defined]
            if each.busy is not Busy.NO:
                endpoint.calls.append("opened")
            self.channels.append(self.guest.bus.offer(each.offer, endpoint))
        self.guest.bus.resume()
        wanted: list[Said] = []
        for relid, model in self.model.items():
            if model.revoking and model.state in ("closing", "reopen"):
                wanted += self.rescind_now(relid, model)
        self.expect(wanted + self.disconnected())

    # --- GPADLs ---

    @rule(
        data=st.data(),
        gpadl_id=st.integers(1, 4),
        pages=st.sampled_from([2, 4, 8, 30]),
        sound=st.sampled_from([True, True, True, False]),
    )
    def gpadl_header(self, data: st.DataObject, gpadl_id: int, pages: int, sound: bool) -> None:
        self.gpadl_header_for(self.draw_relid(data), gpadl_id, pages, sound)

    def gpadl_header_for(self, relid: int, gpadl_id: int, pages: int, sound: bool) -> None:
        pfns = list(range(20, 20 + pages)) if sound else [1 << 30] * pages
        parts = split_gpadl(relid, gpadl_id, [GpaRange(pages * 4096, 0, pfns)])
        self.guest.post(parts[0])
        wanted: list[Said] = []
        if self.connected:
            model = self.live(relid)
            known = model is not None and gpadl_id not in model.gpadls and gpadl_id not in self.assemblies
            if not known:
                wanted = [(MessageType.GPADL_CREATED, (relid, gpadl_id, BAD))]
            elif len(parts) > 1:
                self.assemblies[gpadl_id] = (relid, parts[1])
            else:
                wanted = self.created(relid, gpadl_id, sound)
        self.expect(wanted)

    def created(self, relid: int, gpadl_id: int, sound: bool) -> list[Said]:
        if sound:
            self.model[relid].gpadls[gpadl_id] = "accepted"
        return [(MessageType.GPADL_CREATED, (relid, gpadl_id, OK if sound else BAD))]

    @rule(gpadl_id=st.integers(1, 4))
    def gpadl_body(self, gpadl_id: int) -> None:
        relid, payload = self.assemblies.pop(gpadl_id, (0, b"\x09" + bytes(11) + bytes((gpadl_id, 0, 0, 0))))
        self.guest.post(payload)
        sound = payload[16:24] != (1 << 30).to_bytes(8, "little")
        self.expect(self.created(relid, gpadl_id, sound) if relid else [])

    @rule(data=st.data())
    def gpadl_teardown(self, data: st.DataObject) -> None:
        relid = self.draw_relid(data)
        gpadl_id = self.draw_gpadl(data, relid)
        self.guest.answers.clear()
        self.guest.teardown(relid, gpadl_id)
        found = [(answer.number, answer.message.gpadl_id) for answer in self.guest.answers]
        model = self.live(relid)
        wanted: list[Said] = []
        if model is not None and model.gpadls.get(gpadl_id) == "accepted":
            model.gpadls[gpadl_id] = "tearing"
            if model.state == "open" and model.ring == gpadl_id:
                model.state = "closing"
                if not self.defers(relid):
                    wanted = self.closed(relid)
            elif model.state not in ("closing", "reopen"):
                wanted = model.end_teardowns()
        assert found == wanted

    # --- channels ---

    def opening(self, relid: int, model: ModelChannel, open_id: int, ring: int) -> list[Said]:
        size = self.ring_pages(relid, ring) if model.gpadls.get(ring) == "accepted" else 0
        if size < 4:
            return [opened(relid, open_id, BAD)]
        model.state, model.ring = "open", ring
        return [opened(relid, open_id, OK)]

    def ring_pages(self, relid: int, ring: int) -> int:
        channel = self.device(relid)
        assert channel is not None
        return channel.gpadls[ring].page_count

    @rule(data=st.data())
    def open(self, data: st.DataObject) -> None:
        relid = self.draw_relid(data)
        self.open_with(relid, self.draw_gpadl(data, relid))

    def open_with(self, relid: int, ring: int) -> None:
        self.opens += 1
        model = self.live(relid)
        wanted: list[Said] = []
        if model is not None and model.state == "closed":
            wanted = self.opening(relid, model, self.opens, ring)
        elif model is not None and model.state == "closing" and not model.released:
            model.state = "reopen"
            if not model.revoking:
                model.reopen = (self.opens, ring)
        self.guest.answers.clear()
        self.guest.open(relid, ring, open_id=self.opens, downstream=2)
        found = [
            opened(answer.message.relid, answer.message.open_id, answer.message.status)
            for answer in self.guest.answers
        ]
        assert found == wanted

    @precondition(lambda self: any(model.state == "closed" for model in self.model.values()))
    @rule(data=st.data())
    def share_and_open(self, data: st.DataObject) -> None:
        """The usual way, so that channels are open most of the time."""
        closed = [relid for relid, model in self.model.items() if model.state == "closed"]
        relid = data.draw(st.sampled_from(closed))
        ring = data.draw(st.integers(1, 4))
        self.gpadl_header_for(relid, ring, 8, True)
        self.open_with(relid, ring)

    @rule(data=st.data())
    def close(self, data: st.DataObject) -> None:
        relid = self.draw_relid(data)
        slow = self.defers(relid)
        self.guest.post(b"\x07" + bytes(7) + bytes((relid, 0, 0, 0)))
        model = self.live(relid)
        wanted: list[Said] = []
        if model is not None and model.state == "open":
            model.state = "closing"
            if not slow:
                wanted = self.closed(relid)
        self.expect(wanted)

    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        relid = self.draw_relid(data)
        self.guest.post(b"\x0d" + bytes(7) + bytes((relid, 0, 0, 0)))
        model = self.live(relid)
        if model is not None and model.state in ("closed", "revoked"):
            del self.model[relid]
            self.forget_assemblies(relid)
        elif model is not None and model.state == "closing":
            model.released = True
        self.expect([])

    @rule(data=st.data(), vp=st.integers(0, VPS))
    def modify(self, data: st.DataObject, vp: int) -> None:
        relid = self.draw_relid(data)
        self.guest.post(b"\x16" + bytes(7) + bytes((relid, 0, 0, 0, vp, 0, 0, 0)))
        wanted: list[Said] = []
        if self.connected and self.version >= Version.IRON:
            model = self.live(relid)
            fine = model is not None and model.state == "open" and vp < VPS
            wanted = [(MessageType.MODIFYCHANNEL_RESPONSE, (relid, OK if fine else BAD))]
        self.expect(wanted)

    # --- always ---

    @invariant()
    def time_passes(self) -> None:
        self.steps += 1

    @invariant()
    def counts_are_those_of_the_channels(self) -> None:
        bus = self.guest.bus
        held = [gpadl for channel in bus.channels for gpadl in channel.gpadls.values()]
        assert bus.gpadl_assembler.quota.gpadls == len(held) + len(bus.gpadl_assembler.assemblies)
        weights = [gpadl.weight for gpadl in held]
        weights += [assembly.weight for assembly in bus.gpadl_assembler.assemblies.values()]
        assert bus.gpadl_assembler.quota.pages == sum(weights)
        relids = [channel.relid for channel in bus.channels if channel.relid is not None]
        assert len(set(relids)) == len(relids)
        assert set(self.guest.synic.ports) == {2, 3} | {0x2000 | relid for relid in relids}

    @invariant()
    def endpoints_are_called_in_pairs(self) -> None:
        for channel in self.channels:
            calls = channel.endpoint.calls  # type: ignore[attr-defined]
            assert calls.count("opened") - calls.count("closed") == channel.endpoint.is_open  # type: ignore[attr-defined]

    @invariant()
    def nothing_is_left_after_a_disconnection(self) -> None:
        if not self.connected and self.after is None:
            assert (
                self.guest.bus.gpadl_assembler.quota.gpadls == self.guest.bus.gpadl_assembler.quota.pages == 0
            )
            assert all(channel.state is ChannelState.RELEASED for channel in self.guest.bus.channels)


BusModel.TestCase.settings = settings(deadline=None, max_examples=150, stateful_step_count=60)
TestBusModel = BusModel.TestCase
