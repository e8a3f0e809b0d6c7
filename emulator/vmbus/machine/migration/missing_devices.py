"""Devices that a restored guest had where it was saved, and that are not offered here: their channels are revoked."""

from __future__ import annotations

from collections.abc import Sequence

from vmbus.provision.drivers import DEVICES
from vmbus.wire.saved import ChannelIdentity

_NAMES = {kind.interface_id: kind.name for kind in DEVICES}

_NAMED = 8
"""Devices that the sentence names."""


def lost(channels: Sequence[ChannelIdentity]) -> str:
    """Return the sentence about the devices of ``channels`` for log and ``vmbus status``."""
    devices = {each.instance_id: each.interface_id for each in channels}
    named = [
        f"{_NAMES.get(interface, str(interface))} ({instance})"
        for instance, interface in list(devices.items())[:_NAMED]
    ]
    if len(devices) > _NAMED:
        named.append(f"{len(devices) - _NAMED} more")
    return (
        f"the guest had devices that are not offered here, so their channels are revoked: "
        f"{', '.join(named)}; offer them with `vmbus device add` if it needs them, but what they were doing is lost"
    )
