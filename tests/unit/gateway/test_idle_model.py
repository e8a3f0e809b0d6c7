"""No interrupt is lost between a vCPU that is about to halt and the emulator: every interleaving is tried.

The two automata are those of ``idle.c`` (gateway) and ``signals.c`` (emulator), instruction by instruction, on a
machine with the store order of x86. What must hold whenever nothing happens any more: the guest has read everything
that was sent to it, and no interrupt is pending anywhere (so a machine that is stopped can be saved without these
words).

Each variant of the protocol in which one step is missing or misplaced must be found faulty by the same search: they
show that the search can find something.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import pytest

from tests.unit.gateway.total_store_order import Instruction, Machine, State, explore

RUNNING, POLLING, HALTED = 0, 1, 2


@dataclass(frozen=True)
class Protocol:
    """The protocol as it is; a variant differs in one field."""

    name: str = "as it is"
    halted_before_last_look: bool = True
    fence_before_last_look: bool = True
    takes_at_once: bool = True
    """The vCPU takes all vectors in one step, rather than reading and clearing."""
    pending_before_idle: bool = True
    pending_is_locked: bool = True
    takes_back: bool = True
    takes_back_at_once: bool = True
    flag_is_locked: bool = True
    data_before_flag: bool = True
    running_is_watched: bool = True
    sent_unless_polling: bool = True


def vcpu(protocol: Protocol, kinds: int) -> list[Instruction]:
    """A guest that halts, or works without end, and handles interrupts: clears the flag, then reads what was sent."""
    last_look: list[Instruction] = [
        ("load", "found", "pending"),
        ("is", "found", 0, "sleep"),
    ]
    if protocol.takes_at_once:
        last_look += [("lock", "swap", "pending", 0, "found")]
    else:
        last_look += [("store", "pending", 0)]
    last_look += [("lock", "or", "apic", "found", "_")]
    halted: list[Instruction] = [("store", "idle", HALTED)]
    if protocol.fence_before_last_look:
        halted.append(("fence",))
    ends = [("label", "sleep")]
    text: list[Instruction] = [
        ("choose", "interruptible"),
        ("label", "halt"),
        ("store", "idle", POLLING),
        ("label", "poll"),
        ("load", "found", "pending"),
        ("if", "found", 0xFF, "polled"),
        ("forget", "found"),
        ("choose", "poll"),
        ("label", "polled"),
    ]
    if protocol.halted_before_last_look:
        text += [*halted, *last_look, *ends]
    else:
        text += [*last_look, *ends, *halted]
    text += [
        ("label", "interruptible"),
        ("wait", "apic"),
        ("lock", "swap", "apic", 0, "vectors"),
        ("store", "idle", RUNNING),
    ]
    for kind in range(kinds):  # a vector for each, so that no other interrupt makes up for a lost one
        text += [
            ("unless", "vectors", 1 << kind, f"not {kind}"),
            ("lock", "and", "flags", ~(1 << kind), "set"),
            ("unless", "set", 1 << kind, f"not {kind}"),
            ("load", f"seen {kind}", f"sent {kind}"),
            ("label", f"not {kind}"),
        ]
    text += [("forget", "vectors", "found", "set"), ("choose", "halt"), ("goto", "interruptible")]
    return text


def _post(protocol: Protocol, bit: int, *, waits: bool, tag: str) -> list[Instruction]:
    """``signals_post()``, and what its caller does; ``waits``: the caller gives a vCPU that runs time to halt."""
    set_pending: list[Instruction] = [("lock", "or", "pending", bit, "_")]
    if not protocol.pending_is_locked:
        set_pending = [("store", "pending", bit)]
    read_idle: list[Instruction] = [("load", "idle", "idle")]
    text = [*set_pending, *read_idle] if protocol.pending_before_idle else [*read_idle, *set_pending]
    text.append(("is", "idle", POLLING, f"done {tag}"))
    if not protocol.sent_unless_polling:
        text.append(("is", "idle", RUNNING, f"done {tag}"))
    if waits:
        text += [
            ("is", "idle", HALTED, f"back {tag}"),
            ("label", f"watch {tag}"),
            ("load", "old", "pending"),
            ("unless", "old", bit, f"done {tag}"),
            ("load", "idle", "idle"),
            ("is", "idle", HALTED, f"back {tag}"),
            ("choose", f"watch {tag}"),
            ("label", f"back {tag}"),
        ]
        if not protocol.running_is_watched:
            text[-2] = ("goto", f"done {tag}")
    if not protocol.takes_back:
        return [*text, ("goto", f"done {tag}")]
    if protocol.takes_back_at_once:
        text.append(("lock", "and", "pending", ~bit, "old"))
    else:
        text += [("load", "old", "pending"), ("store", "pending", 0)]
    return [*text, ("unless", "old", bit, f"done {tag}"), ("lock", "or", "wire", bit, "_")]


def signaller(
    protocol: Protocol, kind: int, count: int, *, waits: bool = False, dies: bool = False
) -> list[Instruction]:
    """``count`` signals of one kind; ``dies``: its process may end at any step, and another one takes over."""
    bit = 1 << kind
    text: list[Instruction] = []
    for number in range(1, count + 1):
        send: list[Instruction] = [("store", f"sent {kind}", number)]
        flag: list[Instruction] = [("lock", "or", "flags", bit, "flag")]
        if not protocol.flag_is_locked:
            flag = [("fence",), ("load", "flag", "flags"), ("is", "flag", 0, f"first {number}")]
            flag += [("store", "flags", 3), ("goto", f"set {number}")]
            flag += [("label", f"first {number}"), ("store", "flags", bit), ("label", f"set {number}")]
        text += [*send, *flag] if protocol.data_before_flag else [*flag, *send]
        text += [("if", "flag", bit, f"done {number}")]
        text += _post(protocol, bit, waits=waits, tag=str(number))
        text += [("label", f"done {number}"), ("forget", "flag", "idle", "old")]
    if dies:
        # What is pending belongs to nobody. Every channel is signalled once, whatever its flag says.
        text += [
            ("end",),
            ("label", "successor"),
            ("fence",),
            ("lock", "swap", "pending", 0, "_"),
            ("lock", "or", "flags", bit, "_"),
            ("lock", "or", "wire", bit, "_"),
        ]
    return [*text, ("end",)]


QEMU: Sequence[Instruction] = [
    ("label", "again"),
    ("wait", "wire"),
    ("lock", "swap", "wire", 0, "taken"),
    ("lock", "or", "apic", "taken", "_"),
    ("forget", "taken"),
    ("goto", "again"),
]
"""The main loop: an interrupt that was sent to it reaches the local APIC at some time."""


def search(protocol: Protocol, signallers: Iterable[Sequence[Instruction]]) -> tuple[int, list[str]]:
    """Return the number of states, and what is wrong at the first end that is."""
    programs = list(signallers)
    kinds = len(programs)
    memory = {"idle": RUNNING, "pending": 0, "flags": 0, "apic": 0, "wire": 0}
    memory |= {f"sent {kind}": 0 for kind in range(kinds)}
    machine = Machine(memory, [vcpu(protocol, kinds), QEMU, *programs])
    states, ends = explore(machine, lambda end: bool(_wrong(machine, end, kinds)))
    assert ends, "it never comes to rest"
    return states, _wrong(machine, ends[-1], kinds)


def _wrong(machine: Machine, end: State, kinds: int) -> list[str]:
    wrong = [f"{name} is left" for name in ("pending", "flags", "apic", "wire") if machine.value(end, name)]
    for kind in range(kinds):
        if machine.register(end, 0, f"seen {kind}") != machine.value(end, f"sent {kind}"):
            wrong.append(f"a signal of kind {kind} is lost")
    return wrong


def scenarios(protocol: Protocol) -> dict[str, list[list[Instruction]]]:
    return {
        "one": [signaller(protocol, 0, 3)],
        "one that waits": [signaller(protocol, 0, 3, waits=True)],
        "two": [signaller(protocol, 0, 1), signaller(protocol, 1, 1)],
        "two, one waits": [signaller(protocol, 0, 1, waits=True), signaller(protocol, 1, 1)],
        "one that dies": [signaller(protocol, 0, 2, waits=True, dies=True)],
    }


@pytest.mark.parametrize("scenario", scenarios(Protocol()))
def test_no_interrupt_is_lost(scenario: str) -> None:
    states, wrong = search(Protocol(), scenarios(Protocol())[scenario])
    assert wrong == []
    assert states > 500


VARIANTS = (
    Protocol("the last look before HALTED", halted_before_last_look=False),
    Protocol("no fence between HALTED and the last look", fence_before_last_look=False),
    Protocol("the vCPU clears in two steps", takes_at_once=False),
    Protocol("idle is read before pending is set", pending_before_idle=False),
    Protocol("pending is set without a lock", pending_is_locked=False),
    Protocol("nothing is taken back", takes_back=False),
    Protocol("taken back in two steps", takes_back_at_once=False),
    Protocol("a flag is set in two steps", flag_is_locked=False),
    Protocol("the flag before the data", data_before_flag=False),
    Protocol("a vCPU that runs is believed to look", sent_unless_polling=False),
    Protocol("a vCPU that runs is waited for and then forgotten", running_is_watched=False),
)


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.name)
def test_each_step_is_needed(variant: Protocol) -> None:
    assert any(
        search(variant, each)[1] for name, each in scenarios(variant).items() if name != "one that dies"
    ), "the search does not notice"
