"""The QEMU to use: the user's, the machine's, or a private copy.

    $VMBUS_QEMU set       that one, or an error that says what it lacks
    on PATH, suitable     that one
    private copy exists   that one
    else                  MissingRequirement: run `vmbus setup`

Suitable: version 11.1 or newer (the gateway's plug-in interface), built with TCG plug-ins, answers ``-qtest``.

The private copy consists of Debian's own packages, unpacked side by side and run by their own dynamic linker, so that
it uses none of this machine's libraries. Its process is therefore called ``ld-linux-x86-64.so.2``, and its command
line begins with that linker's options.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from vmbus.errors import MissingRequirement
from vmbus.provision import cache
from vmbus.provision.apt import Archive

MINIMUM_VERSION = (11, 1)
SUITE = "trixie"
PACKAGES = ("qemu-system-x86", "qemu-utils", "dbus-daemon", "dbus-bin")
_LIBRARIES = "usr/lib/x86_64-linux-gnu"
_LINKER = "usr/lib64/ld-linux-x86-64.so.2"


@dataclass(frozen=True, slots=True)
class QemuBinary:
    """A QEMU and its tools; the command of each is an argv prefix."""

    argv_prefix: tuple[str, ...]
    """``[*argv_prefix, "-machine", ...]`` starts QEMU; the prefix includes the firmware folders."""
    version: tuple[int, int, int]
    origin: str
    """"VMBUS_QEMU", "PATH" or "private"."""
    firmware: tuple[Path, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    """Variables to add to the process' environment (the folder of QEMU's loadable modules)."""
    plugins: bool = True
    qtest: bool = True
    dbus_vmstate: bool = True
    sandbox: bool = True
    """Whether it has ``-sandbox``."""
    root: Path | None = None
    """The private copy's folder."""

    def tool(self, name: str) -> tuple[str, ...]:
        """Return the argv prefix of ``qemu-img``, ``qemu-nbd`` or ``dbus-daemon``.

        The tool is that of this copy, else that on PATH. Raises :class:`MissingRequirement`.
        """
        if self.root is not None and (self.root / "usr/bin" / name).exists():
            return _private_command(self.root, name)
        beside = Path(self.argv_prefix[0]).parent / name
        if found := str(beside) if self.root is None and os.access(beside, os.X_OK) else shutil.which(name):
            return (found,)
        raise MissingRequirement(f"there is no {name} on this machine: run `vmbus setup`, or install it")

    def qemu_img(self) -> tuple[str, ...]:
        return self.tool("qemu-img")

    def qemu_nbd(self) -> tuple[str, ...]:
        return self.tool("qemu-nbd")

    def dbus_daemon(self) -> tuple[str, ...]:
        """Return the argv prefix of a ``dbus-daemon``, the machine's own if it has one."""
        if found := shutil.which("dbus-daemon"):
            return (found,)
        return self.tool("dbus-daemon")

    def lacks(self) -> list[str]:
        """Return in words why this QEMU is unsuitable; empty if it is suitable."""
        reasons = []
        if self.version[:2] < MINIMUM_VERSION:
            have = ".".join(map(str, self.version))
            reasons.append(
                f"it is version {have}, and {MINIMUM_VERSION[0]}.{MINIMUM_VERSION[1]} or newer is needed"
            )
        if not self.plugins:
            reasons.append("it was built without TCG plug-ins (configure --enable-plugins)")
        if not self.qtest:
            reasons.append("it does not accept -qtest")
        return reasons


def find_qemu(folder: Path | None = None, environ: Mapping[str, str] = os.environ) -> QemuBinary:
    """Return the QEMU to use; ``folder`` is the cache folder. Raises :class:`MissingRequirement` with what to do."""
    folder = folder or cache.cache_folder()
    if chosen := environ.get("VMBUS_QEMU"):
        path = shutil.which(chosen) or chosen
        if not os.access(path, os.X_OK):
            raise MissingRequirement(
                f"VMBUS_QEMU is {chosen}, which is not an executable program: set it to a qemu-system-x86_64"
            )
        qemu = probe((path,), "VMBUS_QEMU", folder)
        if reasons := qemu.lacks():
            raise MissingRequirement(f"VMBUS_QEMU ({chosen}) is unsuitable: {'; '.join(reasons)}")
        return qemu
    reasons = []
    own = shutil.which("qemu-system-x86_64", path=environ.get("PATH"))
    if own:
        try:
            qemu = probe((own,), "PATH", folder)
        except MissingRequirement as error:
            reasons = [str(error)]
        else:
            reasons = qemu.lacks()
            if not reasons:
                return qemu
    if private := private_qemu(folder):
        return private
    found = f"this machine's QEMU ({own}) is unsuitable: {'; '.join(reasons)}" if own else "there is no QEMU"
    raise MissingRequirement(
        f"{found}: run `vmbus setup`, which unpacks a private one, or set VMBUS_QEMU to a "
        f"qemu-system-x86_64 of version {MINIMUM_VERSION[0]}.{MINIMUM_VERSION[1]} or newer with TCG plug-ins"
    )


def private_qemu(folder: Path) -> QemuBinary | None:
    """Return the private copy in the cache ``folder``, else None.

    Raises :class:`~vmbus.errors.UserError` if another user can change it.
    """
    for root, stamp in cache.complete_folders(folder / "qemu"):
        if root.joinpath(_LINKER).exists():
            version = _parse_version(str(stamp.get("version", "")))
            if version is not None:
                for place in (
                    root / _LINKER,
                    root / _LIBRARIES / "qemu",
                    root / "usr/bin/qemu-system-x86_64",
                ):
                    if place.exists():
                        cache.check(place)
                return _private(root, version, bool(stamp.get("dbus_vmstate", True)))
    return None


def fetch_qemu(folder: Path, archive: Archive) -> QemuBinary:
    """Fetch, unpack and return the private copy. The lock of the cache must be held."""
    if platform.machine() != "x86_64":
        raise MissingRequirement(
            f"the private QEMU is for x86-64 machines, this one is {platform.machine()}: install QEMU 11.1 or newer"
        )
    offered = archive.versions("qemu-system-x86")
    parsed = _parse_version(re.sub(r"^\d+:", "", offered[0].version)) if offered else None
    if parsed is None or parsed[:2] < MINIMUM_VERSION:
        newest = offered[0].version if offered else "none at all"
        raise MissingRequirement(
            f"the newest QEMU in Debian {archive.codename} and its backports is {newest}, and 11.1 is needed: "
            "check that the mirror has backports, or set VMBUS_QEMU"
        )
    files = archive.closure(PACKAGES, backports=True)
    root = folder / "qemu" / offered[0].version.replace(":", "_")
    stamp: dict[str, object] = {
        "version": ".".join(map(str, parsed)),
        "package": offered[0].version,
        "packages": sorted(file.name for file in files),
    }
    with cache.filling(root, stamp) as temporary:
        archive.unpack(files, temporary)
        probed = probe(_private_command(temporary, "qemu-system-x86_64"), "private", None)
        if reasons := probed.lacks():
            raise MissingRequirement(
                f"Debian's QEMU {offered[0].version} is unsuitable: {'; '.join(reasons)}"
            )
        stamp["dbus_vmstate"] = probed.dbus_vmstate
    archive.forget(files)
    for old in (folder / "qemu").iterdir():
        if old != root:
            shutil.rmtree(old, ignore_errors=True)
    return _private(root, parsed, probed.dbus_vmstate)


def probe(command: tuple[str, ...], origin: str, folder: Path | None) -> QemuBinary:
    """Run ``command`` to find out what its QEMU can do; the result is kept in the cache ``folder``.

    Raises :class:`MissingRequirement` if it does not run.
    """
    try:
        state = Path(command[-1]).stat()
    except OSError as error:
        raise MissingRequirement(f"{command[-1]}: {error.strerror}") from error
    key = f"{Path(command[-1]).resolve()} {state.st_mtime_ns} {state.st_size}"
    record = folder / "qemu-probe.json" if folder is not None else None
    if record is not None:
        try:
            known = json.loads(record.read_text())
            if known["key"] == key:
                return _from_answers(command, origin, known["answers"])
        except (OSError, ValueError, KeyError, TypeError):
            pass  # nothing usable was kept: ask again
    answers = asdict(_ask(command))
    if record is not None:
        cache.write_atomically(record, json.dumps({"key": key, "answers": answers}).encode())
    return _from_answers(command, origin, answers)


@dataclass(frozen=True, slots=True)
class _Answers:
    version: str
    plugins: bool
    qtest: bool
    dbus_vmstate: bool
    sandbox: bool


_NO_MACHINE = ("-machine", "none", "-nodefaults", "-display", "none", "-monitor", "stdio")


def _ask(command: tuple[str, ...]) -> _Answers:
    version = _run(*command, "--version")
    match = re.search(r"version (\d+\.\d+(?:\.\d+)?)", version)
    if match is None:
        raise MissingRequirement(f"{command[-1]} is not a QEMU: `--version` says {version.strip()[:80]!r}")
    qtest = _run(*command, *_NO_MACHINE, "-qtest", "null", stdin="quit\n", failing=True)
    return _Answers(
        version=match[1],
        plugins="-plugin " in _run(*command, "-help"),
        qtest="invalid option" not in qtest,
        dbus_vmstate="dbus-vmstate" in _run(*command, "-object", "help", failing=True),
        sandbox="sandbox" not in _run(*command, *_NO_MACHINE, "-sandbox", "on", stdin="quit\n", failing=True),
    )


def _from_answers(command: tuple[str, ...], origin: str, answers: Mapping[str, object]) -> QemuBinary:
    version = _parse_version(str(answers["version"]))
    if version is None:
        raise ValueError(f"{answers['version']} is not a version")
    return QemuBinary(
        argv_prefix=command,
        version=version,
        origin=origin,
        plugins=bool(answers["plugins"]),
        qtest=bool(answers["qtest"]),
        dbus_vmstate=bool(answers["dbus_vmstate"]),
        sandbox=bool(answers["sandbox"]),
    )


def _private(root: Path, version: tuple[int, int, int], dbus_vmstate: bool) -> QemuBinary:
    firmware = (root / "usr/share/qemu", root / "usr/share/seabios")
    prefix = list(_private_command(root, "qemu-system-x86_64"))
    for path in firmware:
        prefix += ["-L", str(path)]
    return QemuBinary(
        argv_prefix=tuple(prefix),
        version=version,
        origin="private",
        firmware=firmware,
        environment={"QEMU_MODULE_DIR": str(root / _LIBRARIES / "qemu")},
        dbus_vmstate=dbus_vmstate,
        root=root,
    )


def _private_command(root: Path, name: str) -> tuple[str, ...]:
    return (str(root / _LINKER), "--library-path", str(root / _LIBRARIES), str(root / "usr/bin" / name))


def _parse_version(text: str) -> tuple[int, int, int] | None:
    match = re.match(r"(\d+)\.(\d+)(?:\.(\d+))?", text)
    return (int(match[1]), int(match[2]), int(match[3] or 0)) if match else None


def _run(*command: str, stdin: str = "", failing: bool = False) -> str:
    """Return standard output and error of a short command. Raises :class:`MissingRequirement` unless ``failing``."""
    try:
        done = subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise MissingRequirement(f"{command[0]} does not run: {error}") from error
    output = done.stdout + done.stderr
    if done.returncode and not failing:
        raise MissingRequirement(f"{' '.join(command)} fails: {output.strip()[-300:]}")
    return output
