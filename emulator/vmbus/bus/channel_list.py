"""The channels that are offered, or were offered and are not released yet, and their ids.

Source: docs/protocol/messages.md#offers, docs/protocol/messages.md#rescind-and-release.

A channel has its id from the offer to the release. A device that was revoked and comes back before the release
takes over the id of its predecessor. A device that comes back while its predecessor is still leaving waits, and so
does an offer for which no id is free.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from vmbus.bus.channel.channel import Channel
from vmbus.bus.channel.context import ChannelHost
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
from vmbus.bus.saved_state.restore import ABSENT_DEVICE, restore_channel
from vmbus.bus.saved_state.values import ChannelRecord, capture_channel
from vmbus.errors import DeviceError, InternalError
from vmbus.wire.messages import RESCIND_CHANNELOFFER, ChannelOnly
from vmbus.wire.monitor import MONITOR_COUNT


class ChannelList:
    """The channels that ``host`` offers; ``channel_released`` is called after one was released."""

    def __init__(self, host: ChannelHost, channel_released: Callable[[], None]) -> None:
        self.channels: list[Channel] = []
        """In the order in which their devices were offered."""
        self.by_relid: dict[int, Channel] = {}
        self.waiting: list[Channel] = []
        """Channels for which no id was free."""
        self.restoring = False
        """Whether a state was restored, and some of its devices may not be offered yet."""
        self._released_by_guest: set[OfferKey] = set()
        """Devices of a restored state whose channel the guest had released."""
        self._host = host
        self._channel_released = channel_released

    @property
    def fresh(self) -> bool:
        """Whether nothing was offered to a guest yet."""
        return not self.by_relid and not self.restoring

    @property
    def all_released(self) -> bool:
        """Whether no channel is left of a connection that ended, reserved channels aside."""
        return all(channel.state is ChannelState.RELEASED or channel.reserved for channel in self.channels)

    def subchannels_first(self) -> list[Channel]:
        """Return all channels, sub-channels before primaries."""
        return sorted(self.channels, key=lambda channel: channel.offer.subchannel_index == 0)

    def in_offer_order(self) -> list[Channel]:
        """Return all channels in the order in which the guest gets their offers."""
        return sorted(self.channels, key=lambda channel: sort_key(channel.offer))

    def add(self, offer: Offer, endpoint: Endpoint) -> Channel:
        """See :meth:`Bus.offer`."""
        for restored in self.channels:
            if (
                restored.endpoint is ABSENT_DEVICE
                and restored.offer.key == offer.key
                and not restored.revoking
            ):
                restored.offer, restored.endpoint = offer, endpoint
                return restored
        self._check(offer)
        channel = Channel(self._host, self, offer, endpoint)
        self.channels.append(channel)
        predecessor = self._predecessor(channel)
        if predecessor is None:
            if self._host.connection.offers_sent and not self.restoring:
                self.send_offer(channel)
        elif predecessor.state is ChannelState.REVOKED:
            self._take_over(channel, predecessor)
        return channel

    def revoke(self, channel: Channel) -> None:
        """See :meth:`Bus.revoke`."""
        if channel not in self.channels:
            return
        if channel.state is ChannelState.RELEASED:
            self.revoke_subchannels(channel)
            self._remove(channel)
        else:
            channel.revoke()

    def offer_all(self) -> None:
        """Send every offer."""
        for channel in self.in_offer_order():
            self.send_offer(channel)

    # --- for channels ---

    def connection_id_taken(self, connection_id: int, asking: Channel) -> bool:
        """Return whether a signal on that id reaches another channel than ``asking``, or will when that opens."""
        return any(
            channel.request is not None and channel.request.connection_id == connection_id
            for channel in self.channels
            if channel is not asking
        )

    def revoke_subchannels(self, channel: Channel) -> bool:
        """Revoke the sub-channels of ``channel``; return whether all of them are rescinded or released."""
        if channel.offer.subchannel_index:
            return True
        all_left = True
        for sub in self._subchannels(channel):
            self.revoke(sub)
            all_left = all_left and sub.state in (ChannelState.REVOKED, ChannelState.RELEASED)
        return all_left

    def rescind(self, channel: Channel) -> None:
        """Send RESCIND_CHANNELOFFER: ``channel`` has left, and is revoked now."""
        if channel.relid is not None:
            self._host.send(RESCIND_CHANNELOFFER.build(ChannelOnly(channel.relid)))
        self._departed(channel)

    def released(self, channel: Channel) -> None:
        """Free the id of ``channel``, which stays unless it was revoked or ends with its guest."""
        if channel.relid is not None:
            del self.by_relid[channel.relid]
            self._host.synic.disconnect_event_port(CONNECTION_ID_BASE | channel.relid)
        channel.relid = channel.monitor_id = None
        if channel.revoking or channel.offer.transient or channel.endpoint is ABSENT_DEVICE:
            self._remove(channel)
        self._departed(channel)
        if self.waiting and self._host.connection.offers_sent:
            self.send_offer(self.waiting.pop(0))
        self._channel_released()

    def send_offer(self, channel: Channel) -> None:
        """Send OFFERCHANNEL, with a new id if the channel has none; while no id is free the channel waits."""
        connection = self._host.connection
        if self._predecessor(channel) is not None:
            return
        if channel.relid is None:
            relid = lowest_free(self.by_relid, 1, MAX_RELID)
            if relid is None:
                self._host.refusals.refuse("no-channel-id", repr(channel))
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
        self._host.send(payload)

    # --- saving and restoring ---

    def save(self) -> tuple[ChannelRecord, ...]:
        """Return the state of all channels."""
        return tuple(capture_channel(each, waiting=each in self.waiting) for each in self.channels)

    def restore(self, records: Iterable[ChannelRecord]) -> None:
        """Put the channels into the state of checked records."""
        self.restoring = True
        # The guest stands still: a search for each record would take 18 ms for 300 channels.
        offered = {channel.offer.key: channel for channel in reversed(self.channels) if channel.relid is None}
        for record in records:
            if record.relid is not None:
                there = None if record.revoking else offered.pop(record.key, None)
                self._restore_one(record, record.relid, there)
            elif not record.waiting:
                self._released_by_guest.add(record.key)

    def resume_restored(self) -> None:
        """Continue what was under way at the save: every device that will be offered here is offered."""
        self.restoring = False
        for channel in list(self.channels):
            if channel.endpoint is ABSENT_DEVICE and not channel.revoking:
                self._host.refusals.refuse("restored-without-device", f"{channel.relid}")
                channel.revoking = True
                if channel.state is ChannelState.REOFFERED:
                    channel.state = ChannelState.REVOKED
        new = [
            channel
            for channel in self.in_offer_order()
            if channel.relid is None and channel.offer.key not in self._released_by_guest
        ]
        for channel in list(self.channels):
            if channel in self.channels:
                channel.resume_restored()
        if self._host.connection.offers_sent:
            for channel in new:
                if channel.relid is None and channel in self.channels:
                    self.send_offer(channel)
        self._released_by_guest.clear()

    def forget_restored(self) -> None:
        """Drop a restored state before it was resumed: its guest is gone."""
        self.restoring = False
        self._released_by_guest.clear()

    def _restore_one(self, record: ChannelRecord, relid: int, channel: Channel | None) -> None:
        """Restore into the channel of the device if it is offered already, else into one that waits for it."""
        if channel is None:
            offer = Offer(*record.key[:2], subchannel_index=record.subchannel_index, name="absent")
            channel = Channel(self._host, self, offer, ABSENT_DEVICE)
            self.channels.append(channel)
        restore_channel(channel, record)
        self.by_relid[relid] = channel
        self._host.synic.connect_event_port(CONNECTION_ID_BASE | relid, channel.doorbell)

    # --- details ---

    def _departed(self, channel: Channel) -> None:
        """Continue what waited until ``channel`` was rescinded or released."""
        if channel.offer.subchannel_index:
            for primary in self.channels:
                if primary.offer.key == (*channel.offer.key[:2], 0):
                    primary.leave_when_idle()
        for successor in self.channels:
            if successor is not channel and successor.offer.key == channel.offer.key:
                if channel.state is ChannelState.REVOKED:
                    self._take_over(successor, channel)
                elif self._host.connection.offers_sent:
                    self.send_offer(successor)
                return

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
        self._host.synic.connect_event_port(CONNECTION_ID_BASE | relid, channel.doorbell)

    def _take_over(self, channel: Channel, old: Channel) -> None:
        """Give the id of a revoked channel to ``channel``, whose device is back before the guest released it."""
        relid = old.relid
        if relid is None:
            raise InternalError(f"{old!r} has no id")
        self.channels.remove(old)
        channel.gpadl_list.by_id, old.gpadl_list.by_id = old.gpadl_list.by_id, {}
        channel.monitor_id, old.monitor_id = old.monitor_id, None
        old.relid, old.state = None, ChannelState.RELEASED
        channel.relid, channel.state, channel.offered = relid, ChannelState.REOFFERED, True
        self.by_relid[relid] = channel
        self._host.synic.connect_event_port(CONNECTION_ID_BASE | relid, channel.doorbell)

    def _predecessor(self, channel: Channel) -> Channel | None:
        """Return the channel of the same device that has not left yet."""
        for each in self.channels:
            if each is not channel and each.offer.key == channel.offer.key:
                return each
        return None

    def _subchannels(self, primary: Channel) -> list[Channel]:
        same = primary.offer.key[:2]
        return [each for each in self.channels if each.offer.subchannel_index and each.offer.key[:2] == same]
