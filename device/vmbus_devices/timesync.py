"""Time synchronisation: tells the guest what time it is.

Source: docs/protocol/devices.md#time-synchronisation. After negotiation one *sync* (the guest sets its clock), then
*samples* (Linux feeds them to the PTP clock "hyperv"), each ``interval`` seconds after the answer to the one before.

    | message version | what goes out                                             | guests correct for the way  |
    | 1.0, 3.0        | host time                                                 | no                          |
    | 4.0             | host time, and the reference counter of the same moment   | yes, by their own counter   |

Version 4.0 is offered only where the partition's reference counter can be read: with another clock's value the
guest's time would be wrong by the difference.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Annotated, Any

from vmbus.bus.io.device import DeviceEnvironment
from vmbus.devices.options import Help
from vmbus.errors import DeviceError
from vmbus.ports import TimerHandle
from vmbus.wire.ic import (
    TIMESYNC_BODY,
    TIMESYNC_INSTANCE,
    TIMESYNC_INTERFACE,
    TIMESYNC_REFERENCE_BODY,
    UNIX_EPOCH,
    IcHeader,
    IcMessageType,
    IcStatus,
    IcVersion,
    TimeSyncBody,
    TimeSyncFlags,
    TimeSyncReferenceBody,
)

from vmbus_devices.ic import IntegrationComponent

DEFAULT_INTERVAL = 5.0
"""Seconds; a guest takes a sample older than 600 s for a dead host."""
PATIENCE = 60.0
"""Seconds without an answer that are counted as one missed; the guest may be stopped, so nothing is given up."""

WITH_REFERENCE = IcVersion(4, 0)
WITHOUT_REFERENCE = (IcVersion(1, 0), IcVersion(3, 0))


class TimeSync(IntegrationComponent):
    """Tells the guest what time it is."""

    name = "timesync"
    interface_id = TIMESYNC_INTERFACE
    instance_id = TIMESYNC_INSTANCE
    message_type = IcMessageType.TIMESYNC
    message_versions: tuple[IcVersion, ...] = WITHOUT_REFERENCE

    def __init__(
        self,
        *,
        interval: Annotated[
            float, Help("seconds from an answer to the next sample", least=0.01, most=86400)
        ] = DEFAULT_INTERVAL,
        reference: Annotated[bool, Help("offer version 4.0, with the partition's reference time")] = True,
        wall_clock: Callable[[], int] = time.time_ns,
    ) -> None:
        """``wall_clock``: nanoseconds since 1970-01-01 UTC."""
        super().__init__()
        self.interval = interval
        self.syncs = 0
        self.samples = 0
        self.answers = 0
        self.failed = 0
        """Answers with a status other than ok, or that were refused."""
        self.missed = 0
        self._reference = reference
        self._reference_time: Callable[[], int] | None = None
        self._wall_clock = wall_clock
        self._sync_wanted = False
        self._next: TimerHandle | None = None

    def start(self, environment: DeviceEnvironment) -> None:
        """See whether there is a reference clock."""
        super().start(environment)
        if self._reference and environment.reference_time is not None:
            self._reference_time = environment.reference_time
            self.message_versions = (*WITHOUT_REFERENCE, WITH_REFERENCE)

    def sync(self) -> None:
        """Have the guest set its clock as soon as it can be asked (after a pause of the machine, say)."""
        self._sync_wanted = True
        if self.version is not None and not self.pending:
            self._tell()

    def ready(self) -> None:
        """Set the guest's clock."""
        self.sync()

    def answered(self, header: IcHeader, body: bytes) -> None:
        """The guest has heard it."""
        self.answers += 1
        self.failed += header.status != IcStatus.OK
        self._plan()

    def unanswered(self) -> None:
        """No real answer; go on all the same."""
        self.failed += 1
        self._plan()

    def overdue(self) -> None:
        """The guest does not react."""
        self.missed += 1

    def disconnected(self, pending: bool) -> None:
        """Nobody listens."""
        self._disarm()
        self._sync_wanted = False

    def stop(self) -> None:
        """No more samples."""
        self._disarm()
        super().stop()

    def status(self) -> dict[str, Any]:
        """State and counters."""
        return super().status() | {
            "syncs": self.syncs,
            "samples": self.samples,
            "answers": self.answers,
            "failed": self.failed,
            "missed": self.missed,
        }

    def save(self) -> bytes:
        """Nothing: a restored guest is told anew, since its clock stood still."""
        return b""

    def restore(self, state: bytes) -> None:
        """Versions are negotiated again, then the guest's clock is set."""
        if state:
            raise DeviceError(f"{self.name} keeps no state, but was given {len(state)} bytes")

    def _tell(self) -> None:
        self._disarm()
        flags = TimeSyncFlags.SYNC if self._sync_wanted else TimeSyncFlags.SAMPLE
        self.syncs += self._sync_wanted
        self.samples += not self._sync_wanted
        self._sync_wanted = False
        self.request(self._body(flags), patience=PATIENCE)

    def _body(self, flags: TimeSyncFlags) -> bytes:
        if self.version != WITH_REFERENCE or self._reference_time is None:
            host_time = self._wall_clock() // 100 + UNIX_EPOCH
            return TIMESYNC_BODY.build(TimeSyncBody(host_time, guest_time=0, round_trip=0, flags=int(flags)))
        # Both clocks at the same moment: the guest takes the difference for the message's time on the way.
        reference_time = self._reference_time()
        host_time = self._wall_clock() // 100 + UNIX_EPOCH
        return TIMESYNC_REFERENCE_BODY.build(TimeSyncReferenceBody(host_time, reference_time, int(flags)))

    def _plan(self) -> None:
        if self._sync_wanted:
            self._tell()
        else:
            self._disarm()
            self._next = self.environment.timers.call_later(self.interval, self._tell)

    def _disarm(self) -> None:
        if self._next is not None:
            self._next.cancel()
            self._next = None
