"""Reference time while a guest is stopped, goes on, or comes from another QEMU."""

from __future__ import annotations

from vmbus.machine.clock import TcgClock

GHZ = 2_000_000_000


class Tsc:
    """A guest's TSC that a test moves; ``None``: not sampled."""

    def __init__(self, frequency: int = GHZ) -> None:
        self.tsc_frequency: int | None = frequency
        self.tsc: int | None = None

    def guest_tsc_now(self) -> int | None:
        return self.tsc


def test_time_follows_the_tsc_once_it_is_known() -> None:
    source = Tsc()
    clock = TcgClock(source)
    source.tsc = 10 * GHZ
    first = clock.now()
    source.tsc += GHZ
    assert clock.now() - first in (9_999_999, 10_000_000)


def test_time_stands_still_while_the_guest_is_stopped() -> None:
    source = Tsc()
    clock = TcgClock(source)
    source.tsc = 10 * GHZ
    before = clock.now()
    clock.stop()
    source.tsc += 5 * GHZ  # what the host's TSC does meanwhile
    assert clock.now() == before
    assert not clock.tsc_known
    assert clock.stopped_at == 10 * GHZ
    source.tsc = None
    clock.resume()
    assert before <= clock.now() < before + 10_000_000
    source.tsc = 10 * GHZ + 1000
    assert before <= clock.now() < before + 10_000_000


def test_a_guest_from_another_qemu_keeps_its_time_and_its_frequency() -> None:
    source = Tsc(GHZ + 1000)  # measured anew, a little off
    clock = TcgClock(source)
    clock.stop()
    assert clock.restore(GHZ, 100 * GHZ, 5_000_000_000, 4_999_999_000)
    assert clock.tsc_frequency == GHZ
    assert clock.now() == 4_999_999_000
    clock.resume()
    assert 4_999_999_000 <= clock.now() < 5_000_000_000
    source.tsc = 101 * GHZ
    assert clock.now() == 5_010_000_000 - 1 or clock.now() == 5_010_000_000


def test_a_tsc_of_another_rate_goes_on_from_the_time_at_which_the_guest_was_stopped() -> None:
    source = Tsc(3 * GHZ)
    clock = TcgClock(source)
    clock.stop()
    assert not clock.restore(GHZ, 100 * GHZ, 5_000_000_000, 4_000_000_000)
    assert clock.tsc_frequency == 3 * GHZ
    clock.resume()
    source.tsc = 100 * GHZ + 3 * GHZ
    assert clock.now() in (5_010_000_000 - 1, 5_010_000_000)


def test_time_goes_back_with_a_snapshot() -> None:
    source = Tsc()
    clock = TcgClock(source)
    source.tsc = 200 * GHZ
    assert clock.now() > 900_000_000
    clock.stop()
    assert clock.restore(GHZ, 10 * GHZ, 50_000_000, 49_000_000)
    assert clock.now() == 49_000_000
