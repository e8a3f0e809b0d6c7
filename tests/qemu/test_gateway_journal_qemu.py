"""In a real QEMU: the memory that outlives emulators, and the count of resets."""

from __future__ import annotations

import os
import resource
import socket
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from vmbus.errors import GatewayError
from vmbus.machine.gateway.client import Gateway
from vmbus.machine.gateway.conversation import close_all, converse
from vmbus.machine.gateway.traps import Trap
from vmbus.provision.qemu import find_qemu
from vmbus.wire import gateway as wire

from tests.qemu.bare_guest import long_mode_guest
from tests.qemu.gateway_guests import HELD, predecessor
from tests.qemu.machine_under_test import LIMIT, Machine, next_trap, serve

pytestmark = pytest.mark.qemu

Start = Callable[..., Machine]
BUSY = """
main:
    rdtsc
    jmp main
"""


@pytest.fixture
def start(qemu: list[str], plugin: Path, tmp_path: Path) -> Start:
    def start(program: str | None, *, directory: str = "", options: tuple[str, ...] = ()) -> Machine:
        folder = tmp_path / directory
        folder.mkdir(exist_ok=True)
        image = long_mode_guest(folder, program) if program else None
        return Machine(qemu, plugin, image, folder, options=options)

    return start


def wait_for(condition: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + LIMIT
    while not condition():
        assert time.monotonic() < end, f"{what}: not within {LIMIT} s"
        time.sleep(0.01)


def reported(machine: Machine) -> int:
    """How many resets QEMU has reported so far."""
    machine.ask("query-status")
    return machine.events.count("RESET")


def trap_after_reset(machine: Machine, gateway: Gateway, before: int) -> Trap:
    """Wait for a reset and the guest's first trap after it; ``before``: the count before the reset.

    SeaBIOS resets the machine once more if it finds that the machine ran before: then QEMU reports two, too.
    """
    wait_for(lambda: gateway.resets > before, f"more than {before} resets")
    gateway.forget_requests()
    trap = next_trap(gateway)
    machine.ask("query-status")
    return trap


# --- the memory -------------------------------------------------------------------------------------------------


_PREDECESSOR = """
import sys, time
from tests.qemu.machine_under_test import next_trap
from vmbus.errors import GatewayError
from vmbus.machine.gateway.client import Gateway
gateway = Gateway.attach(sys.argv[1])
memory = gateway.journal_memory()
gateway.activate()
next_trap(gateway)
memory[:5], memory[-4:] = b"first", b"last"
print(gateway.resets, flush=True)
time.sleep(1000)
"""


def test_memory_and_count_outlive_an_emulator_that_is_killed(start: Start) -> None:
    with start(HELD) as machine:
        with predecessor(machine, _PREDECESSOR) as (_, resets):
            assert resets == 1
        assert reported(machine) == 0
        machine.ask("system_reset")  # nobody is attached
        successor = machine.attach()
        with successor.journal_memory() as memory:
            assert (memory[:5], memory[-4:]) == (b"first", b"last")
            assert memory[5 : 1 << 20] == bytes((1 << 20) - 5)
        trap = trap_after_reset(machine, successor, 1)
        assert successor.resets == 1 + reported(machine) >= 2
        successor.answer(trap, 2)
        assert machine.output() == [2]


def test_nobody_can_change_its_size(start: Start) -> None:
    with start(BUSY) as machine:
        gateway = machine.attach()
        _, descriptors = converse(gateway._connection, wire.Message(wire.MessageType.JOURNAL))
        try:
            for size in (0, 2 * wire.JOURNAL_SIZE):
                with pytest.raises(PermissionError):
                    os.ftruncate(descriptors[0], size)
        finally:
            close_all(descriptors)
        with gateway.journal_memory() as memory:
            assert len(memory) == wire.JOURNAL_SIZE


def test_who_is_not_attached_gets_nothing(start: Start) -> None:
    with start(BUSY) as machine:
        gateway = machine.attach()
        with socket.socket(socket.AF_UNIX) as stranger:
            stranger.settimeout(LIMIT)
            stranger.connect(str(machine.socket))
            stranger.sendall(wire.MESSAGE.build(wire.Message(wire.MessageType.JOURNAL)))
            with suppress(ConnectionResetError):
                data, descriptors, _, _ = socket.recv_fds(stranger, 100, 1)
                assert (data, descriptors) == (b"", [])
        assert not gateway.closed


def test_without_a_descriptor_left_qemu_refuses_and_goes_on(start: Start) -> None:
    with start(BUSY) as machine:
        gateway = machine.attach()
        # QEMU opens and closes files while it starts; its gateway closes what it has passed to this process.
        machine.ask("query-status")
        gateway.refresh_clock()
        process, limit = machine.process.pid, resource.RLIMIT_NOFILE
        used = {int(each.name) for each in Path(f"/proc/{process}/fd").iterdir()}
        free = min(set(range(len(used) + 1)) - used)
        before = resource.prlimit(process, limit, (free, resource.getrlimit(limit)[1]))
        with pytest.raises(GatewayError, match="Too many open files"):
            gateway.journal_memory()
        resource.prlimit(process, limit, before)
        gateway.journal_memory().close()
        machine.ask("query-status")


# --- resets -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        ("-machine", "q35"),
        ("-machine", "pc"),
        ("-smp", "2", "-accel", "tcg,thread=single"),
        ("-smp", "2", "-accel", "tcg,one-insn-per-tb=on"),
        ("-smp", "2", "-accel", "tcg,tb-size=1"),
    ],
    ids=["q35", "pc", "one-thread", "one-instruction", "small-buffer"],
)
def test_one_at_the_start_and_one_at_each_reset(start: Start, options: tuple[str, ...]) -> None:
    with start(HELD, options=options) as machine:
        gateway = machine.attach()
        gateway.activate()
        next_trap(gateway)
        assert (gateway.resets, reported(machine)) == (1, 0)
        for _ in range(3):
            before = gateway.resets
            gateway.close()
            machine.ask("system_reset")
            gateway = machine.attach()
            trap_after_reset(machine, gateway, before)
            assert gateway.resets == 1 + reported(machine)


@pytest.mark.parametrize("machine_type", ["q35", "pc"])
def test_firmware_alone_is_counted_like_a_guest_that_is_loaded(start: Start, machine_type: str) -> None:
    with start(None, options=("-machine", machine_type)) as machine:
        gateway = machine.attach()
        wait_for(lambda: gateway.resets == 1, "the start")
        gateway.close()
        machine.ask("system_reset")
        gateway = machine.attach()
        wait_for(lambda: gateway.resets == 1 + reported(machine) >= 2, "the reset")


def test_a_reset_counts_when_the_guest_runs_again(start: Start) -> None:
    with start(HELD, options=("-S",)) as machine:
        gateway = machine.attach()
        gateway.activate()
        machine.ask("query-status")
        assert gateway.resets == 0
        machine.ask("cont")
        next_trap(gateway)
        assert gateway.resets == 1
        machine.ask("stop")
        machine.ask("system_reset")
        wait_for(lambda: reported(machine) == 1, "the reset")
        assert gateway.resets == 1
        machine.ask("cont")
        trap_after_reset(machine, gateway, 1)
        assert gateway.resets == 1 + reported(machine)


@pytest.mark.parametrize(
    "reboot",
    ["mov $0xfe, %al\noutb %al, $0x64", "mov $0xcf9, %edx\nmov $6, %al\noutb %al, %dx", "lidt none\nint3"],
    ids=["keyboard-controller", "cf9", "triple-fault"],
)
def test_resets_by_the_guest_count(start: Start, reboot: str) -> None:
    program = f"""
    main:
        mov $0x40000020, %ecx
        rdmsr
        call hex
        cmp $2, %eax
        je done
        {reboot}
    1:  jmp 1b
    none: .word 0
        .quad 0
    """
    with start(program) as machine:
        gateway = machine.attach()
        gateway.activate()
        trap = next_trap(gateway)
        assert reported(machine) == 0
        gateway.answer(trap, 1)
        trap = next_trap(gateway)
        assert gateway.resets == 1 + reported(machine) >= 2
        gateway.answer(trap, 2)
        assert machine.output() == [1, 2]


def test_an_init_of_the_first_processor_counts_though_it_is_no_reset(start: Start) -> None:
    """The firmware answers it with a reset, which counts as well."""
    program = """
    main:
        mov $0x40000020, %ecx
        rdmsr
        call hex
        cmp $2, %eax
        je done
        mov $0xfee00000, %ebx
        movl $0, 0x310(%rbx)
        movl $0xc500, 0x300(%rbx)        /* INIT to itself */
    1:  jmp 1b
    """
    with start(program) as machine:
        gateway = machine.attach()
        gateway.activate()
        trap = next_trap(gateway)
        assert reported(machine) == 0
        gateway.answer(trap, 1)
        trap = next_trap(gateway)
        assert gateway.resets == 2 + reported(machine)
        gateway.answer(trap, 2)
        assert machine.output() == [1, 2]


def test_halts_and_processors_that_come_and_go_do_not_count(start: Start) -> None:
    """The second processor is started, halts, and is started again; the first one halts for its interrupts."""
    program = """
    main:
        lea other(%rip), %rsi
        mov $0x8000, %edi
        mov $(other_end - other), %ecx
        rep movsb
        movl $0, 0x9000
        mov $0xfee00000, %ebx
        movl $0x1ff, 0xf0(%rbx)
        movl $0x0000000b, 0x3e0(%rbx)    /* timer: divide by 1, periodic, vector 0x40 */
        movl $0x20040, 0x320(%rbx)
        movl $1000000, 0x380(%rbx)
        xor %ebp, %ebp
    1:  inc %ebp
        movl $0xc4500, 0x300(%rbx)       /* INIT to all others */
        sti
        hlt
        cli
        movl $0xc4608, 0x300(%rbx)       /* start at 0x8000 */
    2:  sti
        hlt
        cli
        cmp %ebp, 0x9000
        jne 2b
        cmp $5, %ebp
        jb 1b
        mov $0x40000020, %ecx
        rdmsr
        call hex
        jmp done
    irq40:
        movl $0, 0xb0(%rbx)
        iretq
        .code16
    other:
        xor %ax, %ax
        mov %ax, %ds
        incl 0x9000
    1:  cli
        hlt
        jmp 1b
    other_end:
        .code64
    """
    with start(program, options=("-smp", "2")) as machine:
        gateway = machine.attach()
        gateway.activate()
        trap = next_trap(gateway)
        assert gateway.vcpus == 2
        assert gateway.resets == 1
        gateway.answer(trap, 5)
        serve(gateway, lambda trap: pytest.fail(f"{trap}"))
        assert machine.output() == [5]


def test_a_guest_that_arrives_does_not_count_until_it_is_reset(start: Start, tmp_path: Path) -> None:
    state = tmp_path / "state"
    with start(HELD, directory="source") as source:
        gateway = source.attach()
        gateway.activate()
        next_trap(gateway)
        assert gateway.resets == 1
        source.ask("migrate", uri=f"file:{state}")
        wait_for(lambda: source.ask("query-migrate").get("status") == "completed", "migration")
        assert gateway.resets == 1
    with start(HELD, directory="target", options=("-incoming", f"file:{state}")) as target:
        gateway = target.attach()
        gateway.activate()
        trap = next_trap(gateway)
        assert trap.msr == 0x40000020
        assert gateway.resets == 0
        target.ask("system_reset")
        trap = trap_after_reset(target, gateway, 0)
        assert gateway.resets == reported(target) >= 1
        gateway.answer(trap, 7)
        assert target.output() == [7]


def test_a_snapshot_that_is_loaded_does_not_count(start: Start, tmp_path: Path) -> None:
    """QEMU resets the machine for it, and replaces the state of the processors before they run."""
    image = tmp_path / "image.qcow2"
    subprocess.run([*find_qemu().qemu_img(), "create", "-q", "-f", "qcow2", image, "1M"], check=True)
    with start(HELD, options=("-drive", f"if=none,file={image},format=qcow2")) as machine:
        gateway = machine.attach()
        gateway.activate()
        next_trap(gateway)
        for command in ("savevm before", "loadvm before", "loadvm before"):
            assert machine.ask("human-monitor-command", **{"command-line": command}) == ""
        gateway.forget_requests()
        trap = next_trap(gateway)
        assert gateway.resets == 1
        gateway.answer(trap, 9)
        assert machine.output() == [9]
