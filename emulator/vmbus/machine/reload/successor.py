"""The process that takes over a guest: from the one that serves it (:mod:`vmbus.machine.reload.predecessor`), or
after that was killed (:mod:`vmbus.machine.reload.supervisor`).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vmbus.bus.io.device import Device
from vmbus.errors import VmbusError
from vmbus.machine.gateway.client import Gateway
from vmbus.machine.host import Host
from vmbus.machine.qemu.qmp import Qmp
from vmbus.machine.qemu.qtest import Qtest
from vmbus.machine.reload.description import read_facts, read_options
from vmbus.machine.reload.figures import add_figures
from vmbus.machine.reload.link import Link, Received, ReloadFailed
from vmbus.machine.takeover import GuestLeft

_logger = logging.getLogger(__name__)

_GUEST_TIMEOUT = 60.0
"""Seconds until the process that serves the guest describes it."""
_STATE_TIMEOUT = 120.0
"""Seconds until its state comes: it waits until its devices have finished what is under way."""
_DESCRIPTORS = 5
"""QMP, qtest, and three of the gateway."""


@dataclass(frozen=True, slots=True)
class TakenOver:
    """A guest that was taken over. ``values``, ``descriptors``: what came besides; see ``hand_over``."""

    host: Host
    values: Mapping[str, Any]
    descriptors: Sequence[int]


async def take_over(link: Link, make_devices: Callable[[Sequence[str]], Sequence[Device]]) -> TakenOver:
    """Take over the guest of the process at ``link``, and serve it, or one whose worker was killed.

    ``make_devices`` makes devices from their lines, in another thread. Raises
    :class:`~vmbus.machine.reload.link.ReloadFailed`: then this process has to end, at once, and the guest stays
    where it was.
    """
    described = await link.hear("guest", "recover", timeout=_GUEST_TIMEOUT)
    if described.kind == "recover":
        return await recover(link, described, make_devices)
    devices: Sequence[Device] = ()
    host: Host | None = None
    try:
        devices = await asyncio.to_thread(make_devices, [str(line) for line in described.values["devices"]])
        await link.tell("prepared")
        state = await link.hear("state", timeout=_STATE_TIMEOUT)
        of_qemu, descriptors = state.descriptors[:_DESCRIPTORS], state.descriptors[_DESCRIPTORS:]
        host = _adopt(described.values, state.values, of_qemu, devices)
        with host.qtest.loading():
            host.state.restore(state.data, machine_stays=True)
        add_figures(host, state.values["figures"])
        await link.tell("accepted")
        await link.hear("go", timeout=_STATE_TIMEOUT)
        for device in devices:
            await asyncio.to_thread(device.claim)
        await link.tell("claimed")
        await link.hear("yours", timeout=_STATE_TIMEOUT)
        link.leave()  # which tells the other process that the guest is here
    except ReloadFailed:
        await _give_up(host, devices)
        raise
    except Exception as error:
        if not isinstance(error, VmbusError):  # of a device that is being written, as a rule
            _logger.exception("the guest cannot be taken over")
        why = str(error) if isinstance(error, VmbusError) else f"{type(error).__name__}: {error}"
        await _give_up(host, devices)
        await link.refuse(why)
        raise ReloadFailed(why) from error
    finally:
        link.close()
    await host.begin()
    return TakenOver(host, described.values, descriptors)


async def recover(
    link: Link, begun: Received, make_devices: Callable[[Sequence[str]], Sequence[Device]]
) -> TakenOver:
    """Attach to the guest of a worker that was killed, for the keeper at ``link``, which has said ``recover``.

    Raises :class:`~vmbus.machine.reload.link.ReloadFailed`, after the keeper was told.
    """
    values = begun.values

    def make(lines: Sequence[str] | None) -> Sequence[Device]:
        return make_devices([str(line) for line in (values["devices"] if lines is None else lines)])

    try:
        host = await Host.attach(Path(values["monitor"]), make, read_options(values["options"]))
        host.events.takeovers += int(values["takeovers"])
        await link.tell("recovered")
    except GuestLeft as error:
        await link.tell("left")
        raise ReloadFailed(str(error)) from error
    except ReloadFailed as error:
        await link.refuse(str(error))
        raise
    except Exception as error:
        if not isinstance(error, VmbusError):
            _logger.exception("the guest cannot be taken over")
        why = str(error) if isinstance(error, VmbusError) else f"{type(error).__name__}: {error}"
        await link.refuse(why)
        raise ReloadFailed(why) from error
    finally:
        link.close()
    return TakenOver(host, values, begun.descriptors)


async def _give_up(host: Host | None, devices: Sequence[Device]) -> None:
    if host is not None:
        await host.close()
        return
    for device in devices:
        device.stop()


def _adopt(
    described: Mapping[str, Any],
    values: Mapping[str, Any],
    descriptors: Sequence[int],
    devices: Sequence[Device],
) -> Host:
    facts = read_facts(described["facts"], running=bool(values["running"]))
    options = read_options(described["options"])
    if len(descriptors) != _DESCRIPTORS:
        raise ReloadFailed(
            f"{len(descriptors)} descriptors came with the state, {_DESCRIPTORS} were expected"
        )
    qmp_fd, qtest_fd, *of_gateway = descriptors
    qmp = Qmp.adopt(
        qmp_fd, str(values["unread"]).encode("latin-1"), str(values["qmp"]["path"]), int(values["qmp"]["pid"])
    )
    qtest = Qtest.adopt(qtest_fd)
    gateway = Gateway.adopt(of_gateway, int(values["gateway_size"]), facts.gateway_socket)
    host = Host.adopt(facts, qmp, qtest, gateway, devices, options)
    host.clock.stopped_at = int(values["stopped_at"]) or None
    return host
