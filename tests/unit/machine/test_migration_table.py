"""The emulator's decisions in migrations: every status of QEMU's, and every request, in every phase."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from vmbus.machine.migration.state_machine import (
    Action,
    MigrationStateMachine,
    Phase,
)
from vmbus.saving import StateRefused, read_machine

from tests.unit.machine.migrating import (
    BEGIN,
    END,
    FAILED,
    STATUSES,
    in_a_snapshot,
    incoming,
    left,
    loaded,
    lost,
    migrating,
    ready,
)

MAKERS: dict[Phase, Callable[[], MigrationStateMachine]] = {
    Phase.IDLE: MigrationStateMachine,
    Phase.MIGRATING: migrating,
    Phase.READY: ready,
    Phase.LEFT: left,
    Phase.SNAPSHOT: in_a_snapshot,
    Phase.INCOMING: incoming,
    Phase.LOADED: loaded,
    Phase.LOST: lost,
}


OWN_MIGRATION = {
    "setup": (Phase.MIGRATING, BEGIN),
    "pre-switchover": (None, [Action.SWITCH_OVER]),
    "completed": (None, END),
    "failed": (None, END),
    "cancelled": (None, END),
}
"""Status → phase after it (None: as before) and actions, unless the table below has something else."""


CANCELLED: dict[str, tuple[Phase | None, list[Action]]] = {"pre-switchover": (None, [Action.CANCEL])}


EXPECTED: dict[Phase, dict[str, tuple[Phase | None, list[Action]]]] = {
    Phase.IDLE: OWN_MIGRATION,
    # Without a pause there was no state in QEMU's stream.
    Phase.MIGRATING: {
        **OWN_MIGRATION,
        "completed": (Phase.IDLE, END),
        "failed": (Phase.IDLE, END),
        "cancelled": (Phase.IDLE, END),
    },
    # With a guest that ran, RESUME follows, unless it was stopped at the last moment.
    Phase.READY: {
        **OWN_MIGRATION,
        "completed": (Phase.LEFT, [*END, Action.FENCE]),
        "failed": (None, FAILED),
        "cancelled": (None, FAILED),
    },
    # It was fenced: nothing but a refusal.
    Phase.LEFT: {"setup": (None, [Action.CANCEL_WHEN_SENDING])},
    # Only a migration to elsewhere, which another program has begun, waits.
    Phase.SNAPSHOT: CANCELLED,
    Phase.INCOMING: {**CANCELLED, "completed": (None, [Action.TAKE_STATE])},
    # A guest that ran before was resumed by now. What QEMU has read behind the state may be damaged.
    Phase.LOADED: {
        **CANCELLED,
        "completed": (Phase.IDLE, []),
        "failed": (Phase.INCOMING, [Action.FORGET_GUEST]),
    },
    # It has no state to send, and stays lost.
    Phase.LOST: {"setup": (None, [Action.CANCEL_WHEN_SENDING])},
}


def test_the_table_is_complete() -> None:
    assert set(EXPECTED) == set(MAKERS) == set(Phase)


@pytest.mark.parametrize("status", STATUSES)
@pytest.mark.parametrize("phase", Phase)
def test_every_status_in_every_phase(phase: Phase, status: str) -> None:
    machine = MAKERS[phase]()
    assert machine.phase is phase
    if phase is Phase.READY and status == "completed":
        machine.save_requested()
    after, actions = EXPECTED[phase].get(status, (None, []))
    assert list(machine.migration(status)) == actions
    assert machine.phase is (after or phase)
    followed = phase not in (Phase.SNAPSHOT, Phase.INCOMING, Phase.LOADED)
    assert (machine.report.status == status) == followed


@pytest.mark.parametrize("phase", Phase)
def test_resume_in_every_phase(phase: Phase) -> None:
    machine = MAKERS[phase]()
    if phase is Phase.LEFT:
        assert machine.resumed() == (Action.STOP_GUEST,)
        assert (machine.phase, machine.fenced) == (Phase.LEFT, True)
        return
    assert machine.resumed() == (Action.RESUME,)
    # Its user stopped it and resumes it; or QEMU does, and its report that the migration has failed follows.
    assert machine.phase is (phase if phase is Phase.MIGRATING else Phase.IDLE)
    assert not machine.good
    assert machine.prepared is None


@pytest.mark.parametrize("phase", Phase)
def test_reset_in_every_phase(phase: Phase) -> None:
    """The state that was prepared is of a guest that is gone: the target would write where that one had its pages."""
    machine = MAKERS[phase]()
    assert machine.was_reset() == ((Action.CANCEL,) if phase is Phase.READY else ())
    assert machine.phase is (Phase.IDLE if phase is Phase.LOST else phase)
    if phase in (Phase.READY, Phase.SNAPSHOT):
        assert not machine.ready
        with pytest.raises(StateRefused, match="reset after its state was saved"):
            read_machine(machine.save_requested() or b"")
        assert not machine.handed_over


@pytest.mark.parametrize("phase", Phase)
def test_save_in_every_phase(phase: Phase) -> None:
    machine = MAKERS[phase]()
    prepared_for = phase in (Phase.READY, Phase.SNAPSHOT)
    assert machine.save_requested() == (b"state" if prepared_for else None)


@pytest.mark.parametrize("phase", Phase)
def test_load_in_every_phase(phase: Phase) -> None:
    machine = MAKERS[phase]()
    if phase is Phase.INCOMING:
        machine.load_requested()
    else:
        with pytest.raises(StateRefused, match="without the emulator"):
            machine.load_requested()
