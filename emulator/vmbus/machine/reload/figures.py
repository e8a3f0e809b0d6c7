"""What ``vmbus status`` has counted and reports, which goes on in the next process. None of it is saved state."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from vmbus.bus.io.channel_io import ChannelIo
from vmbus.errors import MalformedError
from vmbus.hypervisor.crash import CrashReport
from vmbus.machine.host import Host
from vmbus.wire.msr import CrashControl


def figures(host: Host) -> dict[str, Any]:
    """Return the counters of ``host`` and its devices, as plain values."""
    return {
        "started": host.started,
        "traps": host.service.traps,
        "doorbells": host.service.doorbells,
        "interrupts": host.interrupts.requests,
        "resets": host.events.resets,
        "takeovers": host.events.takeovers,
        "guest_panicked": host.events.guest_panicked,
        "crashes": [
            [report.parameters, dataclasses.asdict(report.control), report.message]
            for report in host.events.crashes
        ],
        "stopped_because": host.stopped_because,
        "problems": host.problems.keyed(),
        "counters": {name: _values(counters) for name, counters in _counters(host)},
        "devices": {attached.device.name: attached.device.figures() for attached in host.devices},
    }


def add_figures(host: Host, values: Mapping[str, Any]) -> None:
    """Add what :func:`figures` returned of the host of before. What this release does not count is left out.

    Raises :class:`~vmbus.errors.MalformedError`.
    """
    try:
        host.started = float(values["started"])
        host.service.traps += int(values["traps"])
        host.service.doorbells += int(values["doorbells"])
        host.interrupts.requests += int(values["interrupts"])
        host.events.resets += int(values["resets"])
        host.events.takeovers += int(values.get("takeovers", 0))
        host.events.guest_panicked += int(values["guest_panicked"])
        host.events.crashes += [
            CrashReport(tuple(map(int, parameters)), CrashControl(**control), message)
            for parameters, control, message in values["crashes"]
        ]
        host.stopped_because += [str(each) for each in values["stopped_because"]]
        for key, sentence in values["problems"].items():
            host.problems.report(str(key), str(sentence))
        for name, counters in _counters(host):
            _add(counters, values["counters"].get(name, {}))
        for attached in host.devices:
            attached.device.add_figures(values["devices"].get(attached.device.name, {}))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise MalformedError(
            "figures", f"the counters of the process of before cannot be read: {error!r}"
        ) from error


def _counters(host: Host) -> Iterator[tuple[str, Any]]:
    """Yield all counters with their names: dataclasses of numbers, and numbers by reason."""
    yield "synic", host.partition.synic.counters
    yield "hypercalls", host.partition.hypercalls.counters
    yield "partition refusals", host.partition.refusals.counts
    yield "bus refusals", host.bus.refusals.counts
    for channel in host.bus.channels:
        of = f"{channel.offer.interface_id} {channel.offer.instance_id} {channel.offer.subchannel_index}"
        yield f"{of} channel", channel.counters
        yield f"{of} channel refusals", channel.refusals.counts
        if isinstance(io := channel.endpoint, ChannelIo):
            yield f"{of} io", io.counters
            yield f"{of} io refusals", io.refusals.counts


def _values(counters: Any) -> dict[str, Any]:
    if isinstance(counters, dict):
        return {"": list(counters.items())}
    return {
        field.name: list(value.items()) if isinstance(value := getattr(counters, field.name), dict) else value
        for field in dataclasses.fields(counters)
    }


def _add(counters: Any, values: Mapping[str, Any]) -> None:
    if isinstance(counters, dict):
        _add_pairs(counters, values.get("", ()))
        return
    for field in dataclasses.fields(counters):
        here, there = getattr(counters, field.name), values.get(field.name)
        if there is None:
            continue
        if isinstance(here, dict):
            _add_pairs(here, there)
        else:
            setattr(counters, field.name, here + int(there))


def _add_pairs(counts: dict[Any, int], pairs: Any) -> None:
    for name, count in pairs:
        counts[name] = counts.get(name, 0) + int(count)
