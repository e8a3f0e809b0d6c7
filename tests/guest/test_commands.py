"""The commands as a user types them: real processes, real output."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from vmbus.provision.initramfs import KERNEL_ARGUMENTS, build_initramfs
from vmbus.provision.kernel import find_kernel
from vmbus.provision.qemu import find_qemu

from tests.guest.harness import LOADED_MODULES

pytestmark = pytest.mark.guest

VMBUS = [sys.executable, "-m", "vmbus"]
LIMIT = 120.0


def vmbus(*words: str, environment: dict[str, str], **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*VMBUS, *words],
        env=environment,
        capture_output=True,
        text=True,
        timeout=LIMIT,
        check=False,
        **options,
    )  # type: ignore[call-overload,no-any-return]


@pytest.fixture
def environment(tmp_path: Path) -> Iterator[dict[str, str]]:
    """An environment with a runtime directory of its own, which must be empty in the end."""
    runtime = Path("/dev/shm") / f"vmbus-test-{os.getpid()}"
    runtime.mkdir(mode=0o700)
    try:
        yield {**os.environ, "XDG_RUNTIME_DIR": str(runtime)}
        left = [path for path in runtime.rglob("*") if not path.is_dir()]
        assert left == [], "files were left behind"
    finally:
        subprocess.run(["rm", "-rf", str(runtime)], check=True)


def wait_for(condition: Callable[[], object], what: str, limit: float = LIMIT) -> None:
    end = time.monotonic() + limit
    while not condition():
        assert time.monotonic() < end, f"no {what} within {limit:g} s"
        time.sleep(0.05)


def test_run_gives_the_commands_output_and_its_status(tmp_path: Path, environment: dict[str, str]) -> None:
    console = tmp_path / "console.txt"
    added = tmp_path / "hello.sh"
    added.write_text("#!/bin/sh\necho \"added program: $1\"\nprintf '\\001\\377'\nexit 7\n")
    added.chmod(0o755)
    done = subprocess.run(
        [*VMBUS, "run", "--add", f"{added}:/bin/hello", "--serial", str(console), "--", "hello", "a  b"],
        env=environment,
        capture_output=True,
        timeout=LIMIT,
        check=False,
    )
    assert done.returncode == 7, done.stderr
    assert done.stdout == b"added program: a  b\n\x01\xff"
    assert "Hypervisor detected: Microsoft Hyper-V" in console.read_text(errors="replace")


@pytest.mark.parametrize(
    ("words", "complaint", "status"),
    [
        (["run", "--smp", "0"], "--smp 0", 2),
        (["run", "--device", "nonsense"], "nonsense", 2),
        (["run", "--kernel", "/nowhere"], "/nowhere", 2),
        (["run", "--timeout", "1", "--", "sleep", "1000"], "did not end within 1 s", 1),
        (["run", "--qemu", "-device nonsense", "--", "true"], "nonsense", 1),
        (["attach", "--qmp", "/nowhere.sock"], "-qmp unix:/nowhere.sock", 1),
        (["status"], "no emulator runs", 1),
        (["status", "x/y"], "no guest name", 2),
    ],
)
def test_what_went_wrong_is_said_and_nothing_is_left(
    environment: dict[str, str], words: list[str], complaint: str, status: int
) -> None:
    done = vmbus(*words, environment=environment)
    assert complaint in done.stderr
    assert done.returncode == status
    assert "Traceback" not in done.stderr


@contextmanager
def hand_started_qemu(
    tmp_path: Path, environment: dict[str, str], memory: str = "6G"
) -> Iterator[subprocess.Popen]:
    """A QEMU as a user would start it, with the words that ``vmbus qemu-args`` prints."""
    folder = tmp_path / "vm"
    folder.mkdir()
    printed = vmbus("qemu-args", "--dir", str(folder), "--memory", memory, environment=environment)
    assert printed.returncode == 0, printed.stderr
    kernel = find_kernel("debian-6.12")
    line = [
        *find_qemu().argv_prefix,
        *shlex.split(printed.stdout),
        *("-machine", "q35", "-cpu", "max", "-smp", "2", "-display", "none", "-nodefaults"),
        *("-serial", f"file:{tmp_path / 'console.log'}", "-kernel", str(kernel.vmlinuz)),
        *("-initrd", str(build_initramfs(kernel, modules=LOADED_MODULES))),
        *("-append", " ".join(KERNEL_ARGUMENTS)),
    ]
    with subprocess.Popen(line, cwd=folder) as qemu:
        try:
            wait_for((folder / "emulator-qmp.sock").exists, "QMP socket")
            yield qemu
        finally:
            qemu.kill()


@contextmanager
def attached(folder: Path, environment: dict[str, str], *more: str) -> Iterator[subprocess.Popen]:
    """``vmbus attach`` in the background."""
    words = [*VMBUS, "attach", "--qmp", str(folder / "emulator-qmp.sock"), "--name", "hand", *more]
    words += ["--device", "heartbeat,interval=0.2"]
    with subprocess.Popen(words, env=environment, stderr=subprocess.PIPE, text=True) as emulator:
        try:
            yield emulator
        finally:
            emulator.kill()


def status_of(environment: dict[str, str]) -> dict:
    done = vmbus("status", "hand", "--json", environment=environment)
    return json.loads(done.stdout) if done.returncode == 0 else {}


def answers(environment: dict[str, str]) -> int:
    for channel in status_of(environment).get("channels", ()):
        if channel["device"] == "heartbeat":
            return channel["details"]["answers"]
    return 0


def test_attach_to_a_qemu_started_by_hand_status_and_shutdown(
    tmp_path: Path, environment: dict[str, str]
) -> None:
    with hand_started_qemu(tmp_path, environment) as qemu, attached(tmp_path / "vm", environment) as emulator:
        wait_for(lambda: answers(environment) >= 3, "three heartbeats")
        found = status_of(environment)
        assert found["bus"]["version"] == "5.3"
        assert found["vcpus"] == 2
        assert found["qemu"]["memory"] == 6 << 30
        shown = vmbus("status", environment=environment)
        assert "heartbeat" in shown.stdout and "VMBus 5.3" in shown.stdout
        second = vmbus("attach", "--qmp", str(tmp_path / "vm/emulator-qmp.sock"), environment=environment)
        assert second.returncode == 1 and "serves one client" in second.stderr
        asked = vmbus("shutdown", "hand", environment=environment)
        assert (asked.returncode, asked.stdout) == (0, "ok\n"), asked.stderr
        assert qemu.wait(LIMIT) == 0
        assert emulator.wait(LIMIT) == 0


def test_an_emulator_killed_while_the_guest_waits_is_replaced(
    tmp_path: Path, environment: dict[str, str]
) -> None:
    console = tmp_path / "console.log"
    with hand_started_qemu(tmp_path, environment, "512M") as qemu:
        with attached(tmp_path / "vm", environment) as emulator:
            wait_for(lambda: console.exists() and "Microsoft Hyper-V" in console.read_text(), "the kernel")
            emulator.send_signal(signal.SIGKILL)
            emulator.wait(LIMIT)
        with attached(tmp_path / "vm", environment):
            wait_for(lambda: answers(environment) >= 3, "three heartbeats")
            vmbus("shutdown", "hand", environment=environment)
            assert qemu.wait(LIMIT) == 0
    subprocess.run(["rm", "-rf", environment["XDG_RUNTIME_DIR"] + "/vmbus"], check=True)


def test_a_qemu_without_the_options_is_told_what_to_add(tmp_path: Path, environment: dict[str, str]) -> None:
    socket = tmp_path / "qmp.sock"
    line = [*find_qemu().argv_prefix, "-accel", "tcg", "-display", "none", "-nodefaults"]
    with subprocess.Popen([*line, "-S", "-qmp", f"unix:{socket},server=on,wait=off"]) as qemu:
        try:
            wait_for(socket.exists, "QMP socket")
            done = vmbus("attach", "--qmp", str(socket), environment=environment)
        finally:
            qemu.kill()
    assert done.returncode == 1
    for option in ("memory-backend-file", "-qtest unix:", "-plugin", "vmbus qemu-args"):
        assert option in done.stderr


def test_an_emulator_that_is_killed_takes_its_own_qemu_along(environment: dict[str, str]) -> None:
    with subprocess.Popen([*VMBUS, "run", "--name", "doomed"], env=environment) as emulator:
        try:
            directory = Path(environment["XDG_RUNTIME_DIR"]) / "vmbus" / "doomed"
            wait_for((directory / "control.sock").exists, "control socket")
            pid = json.loads(vmbus("status", "doomed", "--json", environment=environment).stdout)["qemu"][
                "pid"
            ]
        finally:
            emulator.kill()
    wait_for(lambda: not Path(f"/proc/{pid}").exists(), "end of QEMU")
    # What a SIGKILL left is swept by the next guest of that name.
    done = vmbus("run", "--name", "doomed", "--", "true", environment=environment)
    assert done.returncode == 0, done.stderr
