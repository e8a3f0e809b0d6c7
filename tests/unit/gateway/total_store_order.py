"""All interleavings of a few threads on a machine with the store order of x86.

A thread is a list of instructions. Its stores wait in a buffer of its own and reach memory one by one, at any time,
while its loads may go first. A locked instruction, and a fence, wait until the buffer is empty. :func:`explore`
visits every state that any order of all these steps can lead to.

    store NAME VALUE       into the buffer                 lock OP NAME VALUE REG   or, and, swap; REG: value before
    load REG NAME          of the own stores first         fence
    if REG MASK LABEL      jump if REG & MASK              unless REG MASK LABEL    jump if not
    is REG VALUE LABEL     jump if equal                   choose LABEL             jump, or do not
    goto LABEL             end                             label LABEL
    wait NAME              until memory is not 0           forget REG...            they are not used any more

VALUE: a number, or the name of a register. The register ``_`` is never read. A step that nobody else can see (a jump,
``forget``) is made together with the one before it, which leaves out no state that matters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

Instruction = tuple[object, ...]
Program = Sequence[Instruction]
Thread = tuple[int, tuple[int, ...], tuple[tuple[int, int], ...]]
"""Number of the next instruction, registers, stores that wait."""
State = tuple[tuple[int, ...], tuple[Thread, ...]]

END = -1
_UNSEEN = ("if", "unless", "is", "goto", "forget")


class Machine:
    """``memory``: names and their values at the start; ``threads``: programs."""

    def __init__(self, memory: Mapping[str, int], threads: Sequence[Program]) -> None:
        self.names = {name: index for index, name in enumerate(memory)}
        self._values = tuple(memory.values())
        self._registers: list[dict[str, int]] = []
        self._programs: list[list[Instruction]] = []
        self.mortal: dict[int, int] = {}
        """Thread → number of the instruction with which somebody else goes on if it dies, at any moment."""
        for program in threads:
            self._add(program)

    def _add(self, program: Program) -> None:
        labels: dict[object, int] = {}
        code: list[Instruction] = []
        for instruction in program:
            if instruction[0] == "label":
                labels[instruction[1]] = len(code)
            else:
                code.append(instruction)
        registers: dict[str, int] = {"_": 0}
        resolved: list[Instruction] = []
        for instruction in code:
            kind, *rest = instruction
            if kind in ("load", "if", "unless", "is"):
                registers.setdefault(str(rest[0]), len(registers))
            elif kind == "lock":
                registers.setdefault(str(rest[3]), len(registers))
            if kind in ("if", "unless", "is", "choose", "goto"):
                rest[-1] = labels[rest[-1]]
            resolved.append((kind, *rest))
        if "successor" in labels:
            self.mortal[len(self._programs)] = labels["successor"]
        self._programs.append(resolved)
        self._registers.append(registers)

    def start(self) -> State:
        return self._values, tuple((0, (0,) * len(each), ()) for each in self._registers)

    def value(self, state: State, name: str) -> int:
        return state[0][self.names[name]]

    def register(self, state: State, thread: int, name: str) -> int:
        return state[1][thread][1][self._registers[thread][name]]

    def steps(self, state: State) -> Iterator[State]:
        """Every state that one step of one thread, or the arrival of one store in memory, leads to."""
        memory, threads = state
        for number, thread in enumerate(threads):
            at, registers, waiting = thread
            if waiting:
                (where, value), *later = waiting
                yield (
                    _put(memory, where, value),
                    _with(threads, number, (at, registers, tuple(later))),
                )
            if at == END:
                continue
            for now, after in self._execute(number, memory, thread):
                yield now, _with(threads, number, after)
            if number in self.mortal and at < self.mortal[number]:
                yield memory, _with(threads, number, (self.mortal[number], registers, waiting))

    def _execute(
        self, number: int, memory: tuple[int, ...], thread: Thread
    ) -> Iterator[tuple[tuple[int, ...], Thread]]:
        at, registers, waiting = thread
        kind, *rest = self._programs[number][at]
        known = self._registers[number]
        after = at + 1
        if kind in ("fence", "lock") and waiting:
            return
        if kind == "store":
            where = self.names[str(rest[0])]
            waiting = (*waiting, (where, self._operand(number, registers, rest[1])))
        elif kind == "load":
            where = self.names[str(rest[1])]
            value = next((found for place, found in reversed(waiting) if place == where), memory[where])
            registers = _put(registers, known[str(rest[0])], value)
        elif kind == "lock":
            operation, name, operand, register = rest
            where = self.names[str(name)]
            before, value = memory[where], self._operand(number, registers, operand)
            result = {"or": before | value, "and": before & value, "swap": value}[str(operation)]
            memory = _put(memory, where, result)
            if register != "_":
                registers = _put(registers, known[str(register)], before)
        elif kind == "wait":
            if not memory[self.names[str(rest[0])]]:
                return
        elif kind == "choose":
            yield memory, self._unseen(number, (int(str(rest[0])), registers, waiting))
        elif kind == "end":
            after = END
        yield memory, self._unseen(number, (after, registers, waiting))

    def _unseen(self, number: int, thread: Thread) -> Thread:
        """Make the steps that only this thread notices."""
        at, registers, waiting = thread
        known = self._registers[number]
        while at != END and self._programs[number][at][0] in _UNSEEN:
            kind, *rest = self._programs[number][at]
            at += 1
            if kind == "forget":
                for name in rest:
                    if str(name) in known:
                        registers = _put(registers, known[str(name)], 0)
                continue
            jump = kind == "goto"
            if not jump:
                value, operand = registers[known[str(rest[0])]], int(str(rest[1]))
                jump = {"if": bool(value & operand), "unless": not value & operand, "is": value == operand}[
                    str(kind)
                ]
            if jump:
                at = int(str(rest[-1]))
        return at, registers, waiting

    def _operand(self, number: int, registers: tuple[int, ...], operand: object) -> int:
        return operand if isinstance(operand, int) else registers[self._registers[number][str(operand)]]


def _with(threads: tuple[Thread, ...], number: int, thread: Thread) -> tuple[Thread, ...]:
    return (*threads[:number], thread, *threads[number + 1 :])


def _put(values: tuple[int, ...], at: int, value: int) -> tuple[int, ...]:
    return (*values[:at], value, *values[at + 1 :])


def explore(
    machine: Machine, found: Callable[[State], bool] = lambda end: False, limit: int = 1_000_000
) -> tuple[int, list[State]]:
    """Return the number of states, and those in which nothing happens any more, up to one that is ``found``."""
    start = machine.start()
    known = {start}
    todo = [start]
    ends = []
    while todo:
        state = todo.pop()
        after = list(machine.steps(state))
        if not after:
            ends.append(state)
            if found(state):
                break
        for each in after:
            if each not in known:
                known.add(each)
                todo.append(each)
        assert len(known) <= limit, "too many states: make the model smaller"
    return len(known), ends
