"""Channels that cannot be continued for a guest whose emulator was killed: each costs its device, and no more.

Guests treat the channels of one device as one: a sub-channel without its primary channel has no state of the device,
and a command that was lost with a sub-channel would be waited for. So all channels of such a device are rescinded,
and the primary one is offered anew: the guest's driver begins from the start.
"""

from __future__ import annotations

import dataclasses
import uuid
from collections.abc import Iterable, Mapping

from vmbus.saving import MachineState
from vmbus.wire.saved import ChannelIdentity

_NAMED = 8
"""Devices that the sentence names."""

DeviceId = tuple[uuid.UUID, uuid.UUID]
"""Interface and instance."""


def device_of(channel: ChannelIdentity) -> DeviceId:
    """Return the device of a channel."""
    return channel.interface_id, channel.instance_id


def devices_of(lost: Mapping[ChannelIdentity, str]) -> dict[DeviceId, str]:
    """Return the devices that have lost channels, each with the reason of the last one."""
    return {device_of(channel): reason for channel, reason in lost.items()}


def without_state(
    state: MachineState, open_channels: Iterable[ChannelIdentity]
) -> dict[ChannelIdentity, str]:
    """Return the open channels of which ``state`` has nothing: their devices could not say it."""
    there = {saved.identity for saved in state.channels}
    return {
        channel: "its device could not say its state" for channel in open_channels if channel not in there
    }


def without_devices_of(state: MachineState, lost: Mapping[ChannelIdentity, str]) -> MachineState:
    """Return ``state`` without the channels of devices of which one is ``lost``."""
    devices = devices_of(lost)
    kept = tuple(saved for saved in state.channels if device_of(saved.identity) not in devices)
    return dataclasses.replace(state, channels=kept)


def sentence(lost: Mapping[str, str]) -> str:
    """Return what is said in log and ``vmbus status``; ``lost``: the reason, by the name of the device."""
    named = [f"{name} ({reason})" for name, reason in list(lost.items())[:_NAMED]]
    if len(lost) > _NAMED:
        named.append(f"{len(lost) - _NAMED} more")
    return (
        "the guest's emulator was killed, and devices could not be continued: their channels are rescinded and "
        f"offered anew, and what the guest had asked of them is lost: {'; '.join(named)}"
    )
