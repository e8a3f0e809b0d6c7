"""Time synchronisation: gives the guest the time of the host.

Source: docs/protocol/devices.md#time-synchronisation. After negotiation one *sync* (the guest sets its clock), then
*samples* (Linux feeds them to the PTP clock "hyperv"), each ``interval`` seconds after the answer to the one before.

    | message version | content                                                   | guests correct for latency  |
    | 1.0, 3.0        | host time                                                 | no                          |
    | 4.0             | host time, and the reference counter of the same moment   | yes, by their own counter   |

Version 4.0 is offered only where the partition's reference counter can be read: with another clock's value the
guest's time would be wrong by the difference.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Annotated, Any

from vmbus.api import DeviceEnvironment, Help, TimerHandle
from vmbus.devices.saved import skip_optional
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
"""Seconds; a guest considers the host dead when the last sample is older than 600 s."""
ANSWER_TIMEOUT = 60.0
"""Seconds after which an answer counts as missed. It is still waited for: the guest may be stopped."""

WITH_REFERENCE = IcVersion(4, 0)
WITHOUT_REFERENCE = (IcVersion(1, 0), IcVersion(3, 0))


class TimeSync(IntegrationComponent):
    """Gives the guest the time of the host."""

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
        """Answers with a status other than ok, and answers that were refused."""
        self.missed = 0
        self._reference = reference
        self._reference_time: Callable[[], int] | None = None
        self._wall_clock = wall_clock
        self._sync_wanted = False
        self._next: TimerHandle | None = None

    def start(self, environment: DeviceEnvironment) -> None:
        """Offer version 4.0 if the reference counter can be read."""
        super().start(environment)
        if self._reference and environment.reference_time is not None:
            self._reference_time = environment.reference_time
            self.message_versions = (*WITHOUT_REFERENCE, WITH_REFERENCE)

    def sync(self) -> None:
        """Have the guest set its clock as soon as no request is pending, for example after a pause of the machine."""
        self._sync_wanted = True
        if self.version is not None and not self.pending:
            self._send_time()

    def ready(self) -> None:
        """Have the guest set its clock."""
        self.sync()

    def answered(self, header: IcHeader, body: bytes) -> None:
        """Plan the next sample."""
        self.answers += 1
        self.failed += header.status != IcStatus.OK
        self._plan()

    def unanswered(self) -> None:
        """Count the refused answer, and plan the next sample."""
        self.failed += 1
        self._plan()

    def overdue(self) -> None:
        """Count a missed answer."""
        self.missed += 1

    def disconnected(self, pending: bool) -> None:
        """Plan nothing more."""
        self._disarm()
        self._sync_wanted = False

    def stop(self) -> None:
        """Send no more samples."""
        self._disarm()
        super().stop()

    def status(self) -> dict[str, Any]:
        """Return state and counters."""
        return super().status() | {
            "syncs": self.syncs,
            "samples": self.samples,
            "answers": self.answers,
            "failed": self.failed,
            "missed": self.missed,
        }

    def save(self) -> bytes:
        """Return nothing: a restored guest sets its clock again, since it stood still."""
        return b""

    def restore(self, state: bytes) -> None:
        """Check that there is no state: versions are negotiated again, and the guest sets its clock."""
        skip_optional(state, self.name)

    def _send_time(self) -> None:
        self._disarm()
        flags = TimeSyncFlags.SYNC if self._sync_wanted else TimeSyncFlags.SAMPLE
        self.syncs += self._sync_wanted
        self.samples += not self._sync_wanted
        self._sync_wanted = False
        self.request(self._body(flags), timeout=ANSWER_TIMEOUT)

    def _body(self, flags: TimeSyncFlags) -> bytes:
        if self.version != WITH_REFERENCE or self._reference_time is None:
            host_time = self._wall_clock() // 100 + UNIX_EPOCH
            return TIMESYNC_BODY.build(TimeSyncBody(host_time, guest_time=0, round_trip=0, flags=int(flags)))
        # Both clocks are read at the same moment: the guest computes the latency of the message from them.
        reference_time = self._reference_time()
        host_time = self._wall_clock() // 100 + UNIX_EPOCH
        return TIMESYNC_REFERENCE_BODY.build(TimeSyncReferenceBody(host_time, reference_time, int(flags)))

    def _plan(self) -> None:
        if self._sync_wanted:
            self._send_time()
        else:
            self._disarm()
            self._next = self.environment.timers.call_later(self.interval, self._send_time)

    def _disarm(self) -> None:
        if self._next is not None:
            self._next.cancel()
            self._next = None
