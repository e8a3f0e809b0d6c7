"""Synthetic timers, four per virtual processor.

Source: docs/protocol/discovery.md#synthetic-timers, TLFS 12.3.

    event                          effect
    -----------------------------  ---------------------------------------------------------------------------
    CONFIG written                 stopped, a queued message is dropped; armed if enable is set
    COUNT = 0                      stopped, enable cleared
    COUNT = n                      enable set if auto-enable; armed if enable is set
    armed, one-shot                expires at reference time COUNT; at once if that is past
    armed, periodic                expires COUNT from now, then every COUNT
    expired, one-shot              enable cleared; interrupt (direct mode) or message
    expired, periodic              interrupt or message; armed for the next multiple of COUNT that is in the future

A message whose slot is busy waits in the SINT's queue and is delivered after EOM. While it waits the timer continues,
but its further expirations add no message. A lazy periodic timer drops the message instead. A message timer on SINT0
cannot be enabled: the intercept SINT takes no timer messages.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from vmbus.hypervisor.msrs import GeneralProtection
from vmbus.hypervisor.reference_time import UNITS_PER_SECOND, ReferenceTime
from vmbus.hypervisor.synic import MIN_VECTOR, Synic
from vmbus.ports import Interrupts, TimerHandle, Timers
from vmbus.wire.msr import STIMER_CONFIG, STIMER_COUNT

ENABLE = 1
MIN_PERIOD = 1000
"""Units of 100 ns (100 us in all): the period of a timer with a smaller COUNT."""

NEVER = (1 << 64) - 1
"""The last reference time, in units of 100 ns: what expires after it never does."""

MAX_SLEEP = 3600.0
"""Seconds; a later expiration is waited for in several steps."""

MIN_RETRY_DELAY = 0.0001
"""Seconds to wait after the first wake-up before the expiration, doubled each time.

Reference time does not advance while the guest is stopped, so that wake-ups may come too early.
"""

MAX_RETRY_DELAY = 0.05
"""Seconds to wait after many wake-ups before the expiration."""


@dataclass(slots=True)
class SyntheticTimer:
    """Registers and state of one timer.

    ``expiration``: reference time in units of 100 ns, None while the timer does not run. ``expired``: how often it
    expired.
    """

    vp: int
    index: int
    config: int = 0
    count: int = 0
    expiration: int | None = None
    expired: int = 0
    early: int = 0
    """Number of wake-ups in a row that came before the expiration."""
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
        self.silent: Callable[[int], None] | None = None
        """Called with the VP of a timer that has expired without a message; for a host with a journal."""

    def write_config(self, vp: int, index: int, value: int) -> None:
        """Write STIMERn_CONFIG of ``vp``; n is ``index``.

        Raises :class:`GeneralProtection` for direct mode if it is not offered or its vector is below 16.
        """
        config = STIMER_CONFIG.parse(value)
        if config.direct and not self._direct_offered:
            raise GeneralProtection("stimer-direct-not-offered", f"timer {index} of VP {vp}")
        if config.direct and config.enable and config.vector < MIN_VECTOR:
            raise GeneralProtection("stimer-vector", f"timer {index} of VP {vp}: vector {config.vector}")
        timer = self.vps[vp][index]
        self._stop(timer)
        timer.config = value
        self._arm_if_enabled(timer)

    def write_count(self, vp: int, index: int, value: int) -> None:
        """Write STIMERn_COUNT of ``vp``; n is ``index``."""
        timer = self.vps[vp][index]
        self._stop(timer)
        timer.count = value
        if value == 0:
            timer.config &= ~ENABLE
        elif STIMER_CONFIG.parse(timer.config).auto_enable:
            timer.config |= ENABLE
        self._arm_if_enabled(timer)

    def pause(self) -> None:
        """Let no timer expire until :meth:`resume`."""
        self.paused = True
        for timer in self._all():
            self._cancel(timer)

    def resume(self) -> None:
        """End :meth:`pause`; timers whose expiration has passed expire now."""
        self.paused = False
        for timer in self._all():
            if timer.expiration is not None:
                self._sleep(timer)

    def reset(self) -> None:
        """Return all timers to the power-on state."""
        for timer in self._all():
            self._stop(timer)
            timer.config = timer.count = 0

    def status(self, vp: int) -> dict[str, object]:
        """Return the timers of ``vp`` that run or have run, for ``vmbus status``."""
        return {
            str(timer.index): {"expiration": timer.expiration, "expired": timer.expired}
            for timer in self.vps[vp]
            if timer.expiration is not None or timer.expired
        }

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
        if config.direct and config.vector < MIN_VECTOR:  # enabled by COUNT, after CONFIG was accepted
            timer.config &= ~ENABLE
            return
        timer.expiration = min(self._time.now() + timer.count, NEVER) if config.periodic else timer.count
        self._sleep(timer)

    def _sleep(self, timer: SyntheticTimer) -> None:
        """Wait for the expiration; handle it before returning if it has passed."""
        if self.paused or timer.expiration is None:
            return
        remaining = timer.expiration - self._time.now()
        if remaining <= 0:
            self._expire(timer, timer.expiration)
            return
        seconds = min(remaining / UNITS_PER_SECOND, MAX_SLEEP)
        if timer.early:
            seconds = max(seconds, min(MIN_RETRY_DELAY * 2 ** min(timer.early, 16), MAX_RETRY_DELAY))
        timer.handle = self._timers.call_later(seconds, lambda: self._wake_up(timer))

    def _wake_up(self, timer: SyntheticTimer) -> None:
        timer.handle = None
        timer.early += 1
        self._sleep(timer)

    def _expire(self, timer: SyntheticTimer, expiration: int) -> None:
        config = STIMER_CONFIG.parse(timer.config)
        timer.expired += 1
        timer.early = 0
        if config.periodic:
            period = max(timer.count, MIN_PERIOD)
            now = self._time.now()
            timer.expiration = min(
                max(expiration + period, now + period - (now - expiration) % period), NEVER
            )
            remaining = (timer.expiration - now) / UNITS_PER_SECOND
            timer.handle = self._timers.call_later(min(remaining, MAX_SLEEP), lambda: self._wake_up(timer))
        else:
            timer.expiration = None
            timer.config &= ~ENABLE
        if config.direct:
            self._interrupts.request(timer.vp, config.vector)
            if self.silent is not None:
                self.silent(timer.vp)
        else:
            self._synic.post_timer(
                timer.vp,
                config.sint,
                timer.index,
                expiration,
                droppable=config.periodic and config.lazy,
            )
