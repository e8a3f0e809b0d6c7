"""Confined processes try what they must not do: to open, connect, execute, and look into others."""

from __future__ import annotations

import json
import os
import resource
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from vmbus.machine.qemu import confined
from vmbus.machine.qemu.child import in_child
from vmbus.machine.qemu.launch import QemuProcess
from vmbus.sandbox import confinement, landlock, report, seccomp
from vmbus.sandbox.confinement import Confinement
from vmbus_devices.scsi.image import ImageFile

needs_landlock = pytest.mark.skipif(not landlock.version(), reason="this kernel has no Landlock")
needs_seccomp = pytest.mark.skipif(not seccomp.available(), reason="this kernel has no seccomp filters")

PROBE = """
import ctypes, errno, json, os, resource, signal, socket, sys, threading
secret, given, folder, unix, port, parent = sys.argv[1:]
libc = ctypes.CDLL(None, use_errno=True)

def attempt(action):
    try:
        action()
    except OSError as error:
        return errno.errorcode[error.errno]
    return "done"

def system(number, *arguments):
    if libc.syscall(number, *arguments) < 0:
        raise OSError(ctypes.get_errno(), "")

def connect(family, address):
    with socket.socket(family) as made:
        made.settimeout(5)
        made.connect(address)

def run(program):
    child = os.fork()
    if not child:
        try:
            os.execv(program, [program])
        except OSError as error:
            os._exit(error.errno)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status:
        raise OSError(status, "")

def end_child():
    child = os.fork()
    if not child:
        while True:
            signal.pause()
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)

found = {
    "open a secret": attempt(lambda: open(secret).read()),
    "overwrite a secret": attempt(lambda: open(secret, "r+b")),
    "list a home": attempt(lambda: os.listdir(os.path.dirname(secret))),
    "open what was given": attempt(lambda: open(given).read()),
    "overwrite what was given": attempt(lambda: open(given, "r+b")),
    "make a file": attempt(lambda: open(folder + "/new", "wb")),
    "execute": attempt(lambda: run("/bin/true")),
    "execute a file of its own": attempt(lambda: run(given)),
    "connect to a socket": attempt(lambda: connect(socket.AF_UNIX, unix)),
    "connect to an abstract socket": attempt(lambda: connect(socket.AF_UNIX, "\\0" + unix)),
    "link a file elsewhere": attempt(lambda: os.link(given, folder + "/link")),
    "end its child": attempt(end_child),
    "connect to a port": attempt(lambda: connect(socket.AF_INET, ("127.0.0.1", int(port)))),
    "signal its parent": attempt(lambda: os.kill(int(parent), 0)),
    "trace its parent": attempt(lambda: system(101, 0x4206, int(parent), 0, 0)),
    "unshare": attempt(lambda: system(272, 0x10000000)),
    "mount": attempt(lambda: system(165, b"none", b"/", b"tmpfs", 0, None)),
    "bpf": attempt(lambda: system(321, 0, None, 0)),
    "start a thread": attempt(lambda: threading.Thread(target=int).start()),
    "core": resource.getrlimit(resource.RLIMIT_CORE),
    "data": resource.getrlimit(resource.RLIMIT_DATA)[1],
    "no_new_privs": libc.prctl(39, 0, 0, 0, 0),
}
print(json.dumps(found))
"""


class Place:
    """A secret, something given, a folder of its own, and two listening sockets."""

    def __init__(self, folder: Path) -> None:
        home = folder / "home"
        home.mkdir()
        self.secret = home / "secret"
        self.secret.write_text("x")
        self.given = folder / "given"
        self.given.write_text("#!/bin/true\n")
        self.given.chmod(0o700)
        self.own = folder / "own"
        self.own.mkdir()
        self.unix = socket.socket(socket.AF_UNIX)
        self.unix.bind(str(folder / "socket"))
        self.unix.listen()
        self.abstract = socket.socket(socket.AF_UNIX)
        self.abstract.bind(f"\0{folder}/socket")
        self.abstract.listen()
        self.tcp = socket.create_server(("127.0.0.1", 0))

    def probe(self, limits: Confinement | None, *, first: str = "") -> dict[str, Any]:
        """What a process under ``limits`` could do, after it has executed ``first``."""
        port = self.tcp.getsockname()[1]
        words = (self.secret, self.given, self.own, self.unix.getsockname(), port, os.getpid())
        program = f"from vmbus.cli.options import confine\n{first}\n{PROBE}" if first else PROBE
        line = [sys.executable, "-I", *([] if first else ["-S"]), "-c", program, *map(str, words)]
        with in_child(limits) as prepare:
            done = subprocess.run(line, preexec_fn=prepare, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        found: dict[str, Any] = json.loads(done.stdout)
        return found


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    made = Place(tmp_path)
    yield made
    made.unix.close()
    made.abstract.close()
    made.tcp.close()


def test_a_process_that_is_not_confined_can_do_all_of_it(place: Place) -> None:
    """The probe itself works: what it reports as refused below is refused by the sandbox."""
    found = place.probe(None)
    for what in (
        "open a secret",
        "overwrite a secret",
        "execute",
        "connect to a socket",
        "connect to an abstract socket",
        "connect to a port",
        "link a file elsewhere",
        "signal its parent",
        "end its child",
    ):
        assert found[what] == "done", what
    assert not found["no_new_privs"]


def test_every_child_gets_no_new_privileges_and_leaves_no_core_file(place: Place) -> None:
    found = place.probe(Confinement())
    assert (found["no_new_privs"], found["core"]) == (1, [0, 0])
    assert found["open a secret"] == "done"  # files are Landlock's


@needs_seccomp
def test_system_calls_that_no_process_needs_are_refused(place: Place) -> None:
    found = place.probe(Confinement())
    for what in ("trace its parent", "unshare", "mount", "bpf"):
        assert found[what] == "EPERM", what
    assert found["start a thread"] == found["execute"] == "done"


@pytest.mark.skipif(not landlock.has_scopes(), reason="this kernel's Landlock has no scopes")
@pytest.mark.parametrize("sandbox", ["on", "off"])
def test_the_emulator_reaches_only_what_it_has_started(place: Place, sandbox: str) -> None:
    """Its signals and its connections to abstract sockets, such as those of X11; files are those of its user."""
    found = place.probe(None, first=f"from argparse import Namespace as N; confine(N(sandbox={sandbox!r}))")
    outside = {found["signal its parent"], found["connect to an abstract socket"]}
    assert outside == ({"EPERM"} if sandbox == "on" else {"done"})
    for what in (
        *("open a secret", "make a file", "link a file elsewhere", "execute", "end its child"),
        *("start a thread", "connect to a socket", "connect to a port"),
    ):
        assert found[what] == "done", what


@needs_landlock
def test_qemu_has_the_files_of_its_command_line_and_no_others(place: Place) -> None:
    python = [sys.executable, "-L", str(Path(os.__file__).parent)]
    line = [*python, "-drive", f"file={place.given},if=none", "-append", f"init={place.secret}"]
    found = place.probe(_with_python(confined.qemu(python[:1], line, place.own)))
    for what in ("open a secret", "overwrite a secret", "list a home"):
        assert found[what] == "EACCES", what
    for what in ("open what was given", "overwrite what was given", "make a file", "start a thread"):
        assert found[what] == "done", what
    assert found["execute a file of its own"] == "EACCES"
    if landlock.version() >= 6:
        assert found["signal its parent"] == "EPERM"


@needs_landlock
@needs_seccomp
def test_a_storage_daemon_has_its_image_and_no_way_out(place: Place) -> None:
    limits = confined.storage_daemon([sys.executable], ImageFile(place.given, "qcow2", read_only=True))
    found = place.probe(_with_python(limits))
    assert found.pop("open what was given") == found.pop("start a thread") == "done"
    assert (found.pop("no_new_privs"), found.pop("core")) == (1, [0, 0])
    assert found.pop("data") == confined.STORAGE_MEMORY
    assert {what: how for what, how in found.items() if how not in ("EPERM", "EACCES")} == {}


def _with_python(limits: Confinement) -> Confinement:
    """The same limits with this interpreter's library, which no QEMU has."""
    from dataclasses import replace

    assert limits.access is not None
    more: tuple[landlock.Access, ...] = (landlock.Access(Path(os.__file__).parent, landlock.READ),)
    more += (landlock.Access(Path(sys.base_prefix), landlock.READ),)
    return replace(limits, access=(*limits.access, *more))


def test_options_of_the_guest_name_no_files_of_the_host(tmp_path: Path) -> None:
    """``root=/dev/sda1`` is the guest's disk. QEMU's processes must not get this machine's."""
    line = ["qemu", "-append", "root=/dev/null console=ttyS0", "-name", f"guest={tmp_path}"]
    access = confined.qemu(["qemu"], line, tmp_path / "run").access or ()
    assert Path("/dev") not in {each.path for each in access}
    assert tmp_path not in {each.path for each in access}


@pytest.mark.parametrize(
    ("words", "rights"),
    [
        (["-drive", "file={0},format=raw"], landlock.CHANGE),
        (["-blockdev", '{{"driver":"file","filename":"{0}","node-name":"a"}}'], landlock.CHANGE),
        (["-serial", "file:{0}"], landlock.CHANGE),
        (["-hda", "{0}"], landlock.CHANGE),
        (["-kernel", "{0}"], landlock.READ),
        (["-plugin", "{0},socket=x"], landlock.READ),
        (["-append", "{0}"], 0),
    ],
)
def test_files_are_found_in_every_kind_of_option(tmp_path: Path, words: list[str], rights: int) -> None:
    file = tmp_path / "a,b"
    file.write_bytes(b"")
    escaped = str(file) if words[1].startswith("{{") else str(file).replace(",", ",,")
    line = ["qemu", *(word.format(escaped) for word in words)]
    access = confined.qemu(["qemu"], line, tmp_path / "run").access or ()
    assert sum(each.rights for each in access if each.path == file) == rights


@pytest.mark.parametrize("name", ["a,b", "a:b", "file:b", "a=b,c:d"])
@pytest.mark.parametrize(("option", "rights"), [("-kernel", landlock.READ), ("-hda", landlock.CHANGE)])
def test_a_file_that_an_option_names_as_it_is_has_any_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, option: str, rights: int
) -> None:
    monkeypatch.chdir(tmp_path)
    for file in (tmp_path / name, tmp_path / "x,y" / name):
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(b"")
        for word in (str(file), str(file.relative_to(tmp_path))):
            access = confined.qemu(["qemu"], ["qemu", option, word], tmp_path / "run").access or ()
            assert rights in [each.rights for each in access if each.path == file]


@pytest.mark.parametrize("word", ["name=opt/a,string=" + 300 * "b", "id=a,data=" + 5000 * "c", "b" * 300])
def test_a_text_that_cannot_be_a_file_name_is_none(tmp_path: Path, word: str) -> None:
    few = confined.qemu(["qemu"], ["qemu", "-fw_cfg"], tmp_path / "run").access
    assert confined.qemu(["qemu"], ["qemu", "-fw_cfg", word], tmp_path / "run").access == few


def test_switched_off_nothing_is_in_force(place: Place) -> None:
    confinement.enable(False)
    try:
        found = place.probe(Confinement(access=()))
        assert (found["no_new_privs"], found["open a secret"]) == (0, "done")
        assert confined.qemu_filter([]) == []
    finally:
        confinement.enable(True)


def test_a_kernel_without_landlock_and_seccomp_still_runs_everything(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(landlock, "version", lambda: 0)
    monkeypatch.setattr(seccomp, "available", lambda: False)
    found = place.probe(Confinement(access=(), tcp=False, threads_only=True))
    assert (found["no_new_privs"], found["open a secret"], found["execute"]) == (1, "done", "done")
    assert confined.qemu_filter([]) == []
    lacking = {layer.name for layer in report.layers() if not layer.there}
    assert lacking == {"Landlock", "seccomp"}
    assert all(layer.lacking for layer in report.layers() if not layer.there)


def test_a_limit_that_is_lower_already_stays(place: Place) -> None:
    with in_child(Confinement(limits={resource.RLIMIT_NOFILE: 1 << 30})) as prepare:
        line = [sys.executable, "-c", "import resource; print(resource.getrlimit(resource.RLIMIT_NOFILE)[1])"]
        done = subprocess.run(line, preexec_fn=prepare, capture_output=True, text=True)
    assert int(done.stdout) == resource.getrlimit(resource.RLIMIT_NOFILE)[1]


@needs_seccomp
def test_calls_of_another_processor_are_refused() -> None:
    """x32 numbers would pass a filter that knows only x86-64's."""
    program = "import ctypes; l = ctypes.CDLL(None, use_errno=True); r = l.syscall(0x40000000 + 39); print(r)"
    with in_child(Confinement()) as prepare:
        done = subprocess.run(
            [sys.executable, "-c", program], preexec_fn=prepare, capture_output=True, text=True
        )
    assert (done.stdout, done.returncode) == ("-1\n", 0)


def test_the_child_still_dies_with_its_parent(tmp_path: Path) -> None:
    program = """
import subprocess, sys, os, signal
from vmbus.machine.qemu.child import in_child
from vmbus.machine.qemu.launch import QemuProcess
from vmbus.sandbox.confinement import Confinement
from vmbus_devices.scsi.image import ImageFile
with in_child(Confinement(access=())) as prepare:
    pass
with in_child(Confinement()) as prepare:
    child = subprocess.Popen(["sleep", "60"], preexec_fn=prepare)
print(child.pid, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    line = [sys.executable, "-c", program]
    with subprocess.Popen(line, stdout=subprocess.PIPE, cwd=Path(__file__).parents[3]) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        assert parent.wait(30) == -signal.SIGKILL
    pidfd = -1
    try:
        pidfd = os.pidfd_open(child)
    except ProcessLookupError:
        return
    import select

    assert select.select([pidfd], [], [], 30)[0]
    os.close(pidfd)


def test_what_the_sandbox_refused_is_named_with_what_to_do(tmp_path: Path) -> None:
    line = [sys.executable, "-c", "print('x: Permission denied')"]
    process = QemuProcess.start(line, tmp_path / "log", None, Confinement())
    process.process.wait(60)
    assert "--allow PATH" in process.messages()
    killed = [sys.executable, "-c", "import os, signal; os.kill(os.getpid(), signal.SIGSYS)"]
    process = QemuProcess.start(killed, tmp_path / "log", None, Confinement())
    process.process.wait(60)
    assert "--sandbox off" in process.messages()
    process = QemuProcess.start(line, tmp_path / "log")
    process.process.wait(60)
    assert process.messages() == "x: Permission denied"
