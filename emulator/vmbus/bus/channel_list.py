"""The channels that are offered, or were and are not released yet, and their ids.

Source: docs/protocol/messages.md#offers, docs/protocol/messages.md#rescind-and-release.

An id is taken from the offer to its release; a device that was taken away and comes back before that takes over
the id of its predecessor. A device that comes back while its predecessor is still leaving waits for it, and so
does an offer for which there is no free id.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from vmbus.bus.channel.channel import Channel
from vmbus.bus.channel.endpoint import Endpoint
from vmbus.bus.channel.state import ChannelState
from vmbus.bus.offers import (
    CONNECTION_ID_BASE,
    MAX_RELID,
    Offer,
    OfferKey,
    build_offer,
    lowest_free,
    sort_key,
)
from vmbus.bus.saved_state.restore import ABSENT, adopt
from vmbus.bus.saved_state.values import ChannelRecord, channel_record
from vmbus.errors import DeviceError, InternalError
from vmbus.wire.monitor import MONITOR_COUNT

if TYPE_CHECKING:
    from vmbus.bus.server import Bus


class ChannelList:
    """What ``bus`` offers."""

    def __init__(self, bus: Bus) -> None:
        self.channels: list[Channel] = []
        """In the order in which their devices came."""
        self.by_relid: dict[int, Channel] = {}
        self.waiting: list[Channel] = []
        """For a free id."""
        self.restoring = False
        """A state was restored, and not all of its devices may be here yet."""
        self._given_up: set[OfferKey] = set()
        self._bus = bus

    @property
    def fresh(self) -> bool:
        """Whether no guest has been told of anything."""
        return not self.by_relid and not self.restoring

    @property
    def all_let_go(self) -> bool:
        """Whether no device holds anything of a connection that ended."""
        return all(channel.state is ChannelState.RELEASED or channel.reserved for channel in self.channels)

    def subchannels_first(self) -> list[Channel]:
        """All channels, sub-channels before primaries."""
        return sorted(self.channels, key=lambda channel: channel.offer.subchannel_index == 0)

    def in_offer_order(self) -> list[Channel]:
        """All channels, as the guest is to get them."""
        return sorted(self.channels, key=lambda channel: sort_key(channel.offer))

    def add(self, offer: Offer, endpoint: Endpoint) -> Channel:
        """See :meth:`Bus.offer`."""
        for absent in self.channels:
            if absent.endpoint is ABSENT and absent.offer.key == offer.key and not absent.revoking:
                absent.offer, absent.endpoint = offer, endpoint
                return absent
        self._check(offer)
        channel = Channel(self._bus, offer, endpoint)
        self.channels.append(channel)
        predecessor = self._predecessor(channel)
        if predecessor is None:
            if self._bus.connection.offers_sent and not self.restoring:
                self.send_offer(channel)
        elif predecessor.state is ChannelState.REVOKED:
            self._take_over(channel, predecessor)
        return channel

    def revoke(self, channel: Channel) -> None:
        """See :meth:`Bus.revoke`."""
        if channel not in self.channels:
            return
        if channel.state is ChannelState.RELEASED:
            self.leave_subchannels(channel)
            self._remove(channel)
        else:
            channel.revoke()

    def offer_all(self) -> None:
        """Send every offer."""
        for channel in self.in_offer_order():
            self.send_offer(channel)

    def leave_subchannels(self, channel: Channel) -> bool:
        """Revoke the sub-channels of ``channel``; whether the guest has been told about all."""
        if channel.offer.subchannel_index:
            return True
        device_notified = True
        for sub in self._subchannels(channel):
            self.revoke(sub)
            device_notified = device_notified and sub.state in (ChannelState.REVOKED, ChannelState.RELEASED)
        return device_notified

    def release(self, channel: Channel) -> None:
        """``channel`` is released: its id is free. It stays unless it was taken away or ends with its guest."""
        if channel.relid is not None:
            del self.by_relid[channel.relid]
            self._bus.synic.disconnect_event_port(CONNECTION_ID_BASE | channel.relid)
        channel.relid = channel.monitor_id = None
        if channel.revoking or channel.offer.transient or channel.endpoint is ABSENT:
            self._remove(channel)
        self.departed(channel)
        if self.waiting and self._bus.connection.offers_sent:
            self.send_offer(self.waiting.pop(0))

    def departed(self, channel: Channel) -> None:
        """``channel`` was rescinded or released: go on with what waited for that."""
        if channel.offer.subchannel_index:
            for primary in self.channels:
                if primary.offer.key == (*channel.offer.key[:2], 0):
                    primary.leave_when_idle()
        for successor in self.channels:
            if successor is not channel and successor.offer.key == channel.offer.key:
                if channel.state is ChannelState.REVOKED:
                    self._take_over(successor, channel)
                elif self._bus.connection.offers_sent:
                    self.send_offer(successor)
                return

    def send_offer(self, channel: Channel) -> None:
        """Send the offer, with an id if it has none yet; without a free one it waits."""
        connection = self._bus.connection
        if self._predecessor(channel) is not None:
            return
        if channel.relid is None:
            relid = lowest_free(self.by_relid, 1, MAX_RELID)
            if relid is None:
                self._bus.refusals.refuse("no-channel-id", repr(channel))
                self.waiting.append(channel)
                return
            self._give_id(channel, relid)
            channel.state = ChannelState.CLOSED
        if channel.relid is None or channel.connection_id is None:
            raise InternalError(f"{channel!r} has no id")
        channel.offered = True
        payload = build_offer(
            channel.offer,
            channel.relid,
            channel.connection_id,
            channel.monitor_id,
            connection.features,
            trusted=connection.trusted,
        )
        self._bus.send(payload)

    # ---- saving and restoring

    def records(self) -> tuple[ChannelRecord, ...]:
        """All channels, to be saved."""
        return tuple(channel_record(each, waiting=each in self.waiting) for each in self.channels)

    def restore(self, records: Iterable[ChannelRecord]) -> None:
        """Be in the state of checked records."""
        self.restoring = True
        for record in records:
            if record.relid is not None:
                self._restore_one(record, record.relid)
            elif not record.waiting:
                self._given_up.add(record.key)

    def go_on(self) -> None:
        """All devices that there will be are offered: take up what was under way."""
        self.restoring = False
        for channel in list(self.channels):
            if channel.endpoint is ABSENT and not channel.revoking:
                self._bus.refusals.refuse("restored-without-device", f"{channel.relid}")
                channel.revoking = True
                if channel.state is ChannelState.REOFFERED:
                    channel.state = ChannelState.REVOKED
        new = [
            channel
            for channel in self.in_offer_order()
            if channel.relid is None and channel.offer.key not in self._given_up
        ]
        for channel in list(self.channels):
            if channel in self.channels:
                channel.go_on()
        if self._bus.connection.offers_sent:
            for channel in new:
                if channel.relid is None and channel in self.channels:
                    self.send_offer(channel)
        self._given_up.clear()

    def forget_restoring(self) -> None:
        """The guest of a restored state is gone before it went on."""
        self.restoring = False
        self._given_up.clear()

    def _restore_one(self, record: ChannelRecord, relid: int) -> None:
        """Into the channel of its device if that is offered already, else into one that waits for it."""
        for channel in self.channels:
            if channel.offer.key == record.key and channel.relid is None and not record.revoking:
                break
        else:
            offer = Offer(*record.key[:2], subchannel_index=record.subchannel_index, name="absent")
            channel = Channel(self._bus, offer, ABSENT)
            self.channels.append(channel)
        adopt(channel, record, self._bus.gpadls)
        self.by_relid[relid] = channel
        self._bus.synic.connect_event_port(CONNECTION_ID_BASE | relid, channel.doorbell)

    # ---- details

    def _remove(self, channel: Channel) -> None:
        channel.revoking = True
        self.channels.remove(channel)
        if channel in self.waiting:
            self.waiting.remove(channel)

    def _check(self, offer: Offer) -> None:
        present = [channel.offer for channel in self.channels if not channel.revoking]
        primaries = [each for each in present if not each.subchannel_index]
        if any(each.key == offer.key for each in present):
            raise DeviceError(f"{offer.name!r} is offered already: {offer.instance_id}")
        if offer.subchannel_index:
            if not any(each.key == (offer.interface_id, offer.instance_id, 0) for each in primaries):
                raise DeviceError(f"{offer.name!r}: sub-channel {offer.subchannel_index} has no primary")
        elif any(each.instance_id == offer.instance_id for each in primaries):
            raise DeviceError(f"{offer.name!r}: another interface uses instance {offer.instance_id}")

    def _give_id(self, channel: Channel, relid: int) -> None:
        channel.relid = relid
        self.by_relid[relid] = channel
        if channel.offer.monitored:
            taken = {each.monitor_id for each in self.channels}
            channel.monitor_id = lowest_free(taken, 0, MONITOR_COUNT - 1)
        self._bus.synic.connect_event_port(CONNECTION_ID_BASE | relid, channel.doorbell)

    def _take_over(self, channel: Channel, old: Channel) -> None:
        """The device of a revoked channel is back before the guest released the id."""
        relid = old.relid
        if relid is None:
            raise InternalError(f"{old!r} has no id")
        self.channels.remove(old)
        channel.pages.by_id, old.pages.by_id = old.pages.by_id, {}
        channel.monitor_id, old.monitor_id = old.monitor_id, None
        old.relid, old.state = None, ChannelState.RELEASED
        channel.relid, channel.state, channel.offered = relid, ChannelState.REOFFERED, True
        self.by_relid[relid] = channel
        self._bus.synic.connect_event_port(CONNECTION_ID_BASE | relid, channel.doorbell)

    def _predecessor(self, channel: Channel) -> Channel | None:
        """A channel of the same device that has not left yet."""
        for each in self.channels:
            if each is not channel and each.offer.key == channel.offer.key:
                return each
        return None

    def _subchannels(self, primary: Channel) -> list[Channel]:
        same = primary.offer.key[:2]
        return [each for each in self.channels if each.offer.subchannel_index and each.offer.key[:2] == same]
