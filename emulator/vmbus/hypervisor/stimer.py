"""Synthetic timers, four a virtual processor.

Source: docs/protocol/discovery.md#synthetic-timers, TLFS 12.3.

    event                          effect
    -----------------------------  ---------------------------------------------------------------------------
    CONFIG written                 what ran stops, a message that still waits is void; enable: armed anew
    COUNT = 0                      stops, enable cleared
    COUNT = n                      enable set if auto-enable; enable: armed anew
    armed, one-shot                expires at reference time COUNT; at once if that is past
    armed, periodic                expires COUNT from now, and so on
    expired, one-shot              enable cleared; interrupt (direct) or message
    expired, periodic              the same, and armed for the next multiple of COUNT that is still to come

A message whose slot is busy waits in the SINT's queue and is delivered after EOM; while it waits the timer goes
on, but its further expirations are not queued up. A lazy periodic timer drops the expiration instead. A message
timer on SINT0 cannot be enabled: the intercept SINT takes no timer messages.
"""

from __future__ import annotations

from dataclasses import dataclass

from vmbus.hypervisor.faults import GeneralProtection
from vmbus.hypervisor.reference_time import UNITS_PER_SECOND, ReferenceTime
from vmbus.hypervisor.synic import FIRST_VECTOR, Synic
from vmbus.ports import Interrupts, TimerHandle, Timers
from vmbus.wire.msr import STIMER_CONFIG, STIMER_COUNT

ENABLE = 1
SHORTEST_PERIOD = 1000
"""100 us, in units of 100 ns: expirations of a shorter period are this far apart."""

LONGEST_SLEEP = 3600.0
"""Seconds; a later expiration is waited for in several steps."""

FIRST_NAP = 0.0001
LONGEST_NAP = 0.05
"""Seconds to sleep after waking too early, doubled each time: reference time stands still in a stopped guest."""


@dataclass(slots=True)
class SyntheticTimer:
    """Registers and state of one timer; ``expiration`` is reference time, None while it does not run."""

    vp: int
    index: int
    config: int = 0
    count: int = 0
    expiration: int | None = None
    expired: int = 0
    early: int = 0
    """How often in a row it woke before its time."""
    handle: TimerHandle | None = None


class SyntheticTimers:
    """All synthetic timers of a partition."""

    def __init__(
        self,
        vp_count: int,
        synic: Synic,
        interrupts: Interrupts,
        timers: Timers,
        time: ReferenceTime,
        *,
        direct_offered: bool,
    ) -> None:
        self._synic = synic
        self._interrupts = interrupts
        self._timers = timers
        self._time = time
        self._direct_offered = direct_offered
        self.vps = [[SyntheticTimer(vp, index) for index in range(STIMER_COUNT)] for vp in range(vp_count)]
        self.paused = False

    def write_config(self, vp: int, index: int, value: int) -> None:
        """Raises :class:`GeneralProtection` for direct mode if it is not offered or its vector is below 16."""
        config = STIMER_CONFIG.parse(value)
        if config.direct and not self._direct_offered:
            raise GeneralProtection("stimer-direct-not-offered", f"timer {index} of VP {vp}")
        if config.direct and config.enable and config.vector < FIRST_VECTOR:
            raise GeneralProtection("stimer-vector", f"timer {index} of VP {vp}: vector {config.vector}")
        timer = self.vps[vp][index]
        self._stop(timer)
        timer.config = value
        self._arm_if_enabled(timer)

    def write_count(self, vp: int, index: int, value: int) -> None:
        timer = self.vps[vp][index]
        self._stop(timer)
        timer.count = value
        if value == 0:
            timer.config &= ~ENABLE
        elif STIMER_CONFIG.parse(timer.config).auto_enable:
            timer.config |= ENABLE
        self._arm_if_enabled(timer)

    def pause(self) -> None:
        """Let nothing expire until :meth:`resume`."""
        self.paused = True
        for timer in self._all():
            self._cancel(timer)

    def resume(self) -> None:
        """Go on; what fell due meanwhile expires now."""
        self.paused = False
        for timer in self._all():
            if timer.expiration is not None:
                self._sleep(timer)

    def reset(self) -> None:
        for timer in self._all():
            self._stop(timer)
            timer.config = timer.count = 0

    def _all(self) -> list[SyntheticTimer]:
        return [timer for vp in self.vps for timer in vp]

    def _cancel(self, timer: SyntheticTimer) -> None:
        if timer.handle is not None:
            timer.handle.cancel()
            timer.handle = None

    def _stop(self, timer: SyntheticTimer) -> None:
        self._cancel(timer)
        timer.early = 0
        timer.expiration = None
        self._synic.withdraw_timer(timer.vp, timer.index)

    def _arm_if_enabled(self, timer: SyntheticTimer) -> None:
        config = STIMER_CONFIG.parse(timer.config)
        if not config.direct and config.sint == 0:
            timer.config &= ~ENABLE
            return
        if not config.enable or timer.count == 0:
            return
        if config.direct and config.vector < FIRST_VECTOR:  # enabled by COUNT, after CONFIG was accepted
            timer.config &= ~ENABLE
            return
        timer.expiration = self._time.now() + timer.count if config.periodic else timer.count
        self._sleep(timer)

    def _sleep(self, timer: SyntheticTimer) -> None:
        """Wait for the expiration; one that has passed takes effect before this returns."""
        if self.paused or timer.expiration is None:
            return
        remaining = timer.expiration - self._time.now()
        if remaining <= 0:
            self._expire(timer, timer.expiration)
            return
        seconds = min(remaining / UNITS_PER_SECOND, LONGEST_SLEEP)
        if timer.early:
            seconds = max(seconds, min(FIRST_NAP * 2 ** min(timer.early, 16), LONGEST_NAP))
        timer.handle = self._timers.call_later(seconds, lambda: self._woke(timer))

    def _woke(self, timer: SyntheticTimer) -> None:
        timer.handle = None
        timer.early += 1
        self._sleep(timer)

    def _expire(self, timer: SyntheticTimer, expiration: int) -> None:
        config = STIMER_CONFIG.parse(timer.config)
        timer.expired += 1
        timer.early = 0
        if config.periodic:
            period = max(timer.count, SHORTEST_PERIOD)
            now = self._time.now()
            timer.expiration = max(expiration + period, now + period - (now - expiration) % period)
            remaining = (timer.expiration - now) / UNITS_PER_SECOND
            timer.handle = self._timers.call_later(min(remaining, LONGEST_SLEEP), lambda: self._woke(timer))
        else:
            timer.expiration = None
            timer.config &= ~ENABLE
        if config.direct:
            self._interrupts.request(timer.vp, config.vector)
        else:
            self._synic.post_timer(
                timer.vp,
                config.sint,
                timer.index,
                expiration,
                droppable=config.periodic and config.lazy,
            )
