"""What QEMU, its storage daemons and the D-Bus daemon may do: the files that were named, and little else.

QEMU can open the files that its command line names, and what programs of this system consist of. Files that are named
later come as descriptors (:mod:`vmbus.machine.migration.addresses`).
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from elftools.common.exceptions import ELFError
from elftools.elf.elffile import ELFFile

from vmbus.machine.qemu.image_files import Image
from vmbus.sandbox import confinement, landlock, seccomp
from vmbus.sandbox.confinement import Confinement
from vmbus.sandbox.landlock import CHANGE, OWN, READ, RUN, Access

QEMU_FILTER = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"
"""QEMU's own ``-sandbox``, which it closes after its start."""

_PROGRAMS = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/opt", "/nix/store", "/gnu/store")
_SETTINGS = (
    *(
        "ld.so.cache",
        "ld.so.conf",
        "ld.so.conf.d",
        "ld.so.preload",
        "localtime",
        "alternatives",
        "ssl",
        "pki",
    ),
    *("passwd", "group", "nsswitch.conf", "host.conf", "hosts", "resolv.conf", "gai.conf", "services"),
    *("qemu", "gnutls", "crypto-policies", "dbus-1", "machine-id", "selinux", "fonts", "sasl2"),
)
_DEVICES = ("null", "zero", "full", "random", "urandom")
_RESOLVER = ("/run/systemd/resolve", "/run/resolvconf", "/run/NetworkManager/resolv.conf")

_READ_ONLY_OPTIONS = frozenset(
    ("-kernel", "-initrd", "-plugin", "-acpitable", "-L", "-bios", "-dtb", "-cdrom", "-readconfig")
)
_NO_FILES = frozenset(("-append", "-name", "-smbios", "-uuid", "-sandbox"))
"""Options whose values look like host files and are not."""

STORAGE_MEMORY = 2 << 30
"""Bytes of private memory of a storage daemon: a damaged or hostile image makes it allocate no more."""


def _system(program: Sequence[str], rights: int) -> Iterator[Access]:
    """Yield what a program needs to start; ``rights`` in the folders of programs."""
    for name in _PROGRAMS:
        yield Access(Path(name), rights)
    for word in program:
        for path in map(Path, word.split(":")):
            if path.is_absolute() and path.exists():
                yield from _installed(path, rights)
    if folder := os.environ.get("QEMU_MODULE_DIR"):
        yield Access(Path(folder), READ)
    for name in _SETTINGS:
        yield Access(Path("/etc", name), READ)
    for name in ("/proc", "/sys", *_RESOLVER):
        yield Access(Path(name), READ)
    for name in _DEVICES:
        yield Access(Path("/dev", name), CHANGE)


def _installed(path: Path, rights: int) -> Iterator[Access]:
    """Yield a program or a folder of its argv prefix, and what was installed beside it."""
    found = path.resolve()
    yield Access(found, rights)
    above = found.parent.parent
    if found.is_file() and found.parent.name in ("bin", "build", "lib64") and above != _home():
        yield Access(above, READ)


def _home() -> Path | None:
    try:
        return Path.home()
    except RuntimeError:  # as where a container runs under a number that no user has
        return None


def _runnable(program: Path) -> Iterator[Access]:
    """Yield ``program`` and the dynamic linker that the kernel starts for it."""
    yield Access(program.resolve(), READ | landlock.EXECUTE)
    try:
        with program.open("rb") as file:
            segments: list[Any] = list(ELFFile(file).iter_segments("PT_INTERP"))
            found = [str(each.get_interp_name()) for each in segments]
    except (OSError, ELFError):  # a script: its interpreter may start anything
        for name in _PROGRAMS:
            yield Access(Path(name), RUN)
        return
    for each in found:
        yield Access(Path(each).resolve(), READ | landlock.EXECUTE)


def storage_daemon(program: Sequence[str], image: Image) -> Confinement:
    """Return the limits of a storage daemon that serves ``image`` over connections that it is given."""
    return Confinement(
        access=(*_system(program, READ), *_runnable(Path(program[0])), *_files_of(image)),
        tcp=False,
        refused=frozenset({*seccomp.ALWAYS_REFUSED.values(), *seccomp.SOCKETS.values()}),
        threads_only=True,
        limits={resource.RLIMIT_DATA: STORAGE_MEMORY},
    )


def _files_of(image: Image) -> Iterator[Access]:
    """Yield the files that the user allows an image to consist of (:mod:`vmbus.machine.qemu.image_files`).

    ``resize`` writes an image that is not read-only.
    """
    rights = READ | landlock.IOCTL_DEV if image.read_only else CHANGE
    yield Access(image.path.resolve(), rights)
    if image.data_file is not None:
        yield Access(image.data_file.resolve(), rights)
    if image.extents:  # the user trusts the names in the image, and so all of these are allowed
        yield Access(Path("/"), rights)
    if image.backing is True:
        yield Access(Path("/"), READ)
    elif image.backing is not False:
        for path in image.backing:
            yield Access(path.resolve(), READ | landlock.IOCTL_DEV)


def dbus_daemon(program: Sequence[str], directory: Path) -> Confinement:
    """Return the limits of the D-Bus daemon of the guest with this run directory."""
    return Confinement(
        access=(
            *_system(program, READ),
            *_runnable(Path(program[0])),
            Access(directory, OWN),
        ),
        tcp=False,
        threads_only=True,
    )


def qemu(
    prefix: Sequence[str], line: Sequence[str], directory: Path, reachable: Sequence[Path] = ()
) -> Confinement:
    """Return the limits of the QEMU with the command line ``line``, which begins with ``prefix``.

    ``directory``: its run directory. ``reachable``: more files and folders that it may use.
    """
    words = line[len(prefix) :]
    return Confinement(
        access=(
            *_system(prefix, RUN),
            Access(directory, OWN),
            *(Access(path.resolve(), OWN) for path in reachable),
            *_named(words),
        ),
    )


def qemu_filter(words: Sequence[str]) -> list[str]:
    """Return QEMU's ``-sandbox``, unless ``words`` have one or processes are not confined."""
    if not confinement.enabled() or not seccomp.available() or "-sandbox" in words:
        return []
    return ["-sandbox", QEMU_FILTER]


def _named(words: Sequence[str]) -> Iterator[Access]:
    """Yield the files that options name, and the folders of those that QEMU will make."""
    option = ""
    for word in words:
        if word.startswith("-"):
            option = word.replace("--", "-", 1)
            if option == "-snapshot":
                yield _temporary()
            continue
        if option in _NO_FILES:
            continue
        rights = READ if option in _READ_ONLY_OPTIONS else CHANGE
        if _is_read_only_node(word):
            rights = READ | landlock.IOCTL_DEV
        yield from _whole(word, rights)
        for value in _values(word):
            if value in ("snapshot=on", "on") and "snapshot=on" in word:
                yield _temporary()
            yield from _file(value, rights)


def _is_read_only_node(word: str) -> bool:
    """Return whether ``word`` is a block node in JSON that never becomes writable."""
    try:
        node = json.loads(word) if word.startswith("{") else None
    except ValueError:
        return False
    return isinstance(node, dict) and node.get("read-only") is True and node.get("auto-read-only") is not True


def _temporary() -> Access:
    return Access(
        Path(os.environ.get("TMPDIR", "/var/tmp")), CHANGE | landlock.MAKE_REG | landlock.REMOVE_FILE
    )


def _whole(word: str, rights: int) -> Iterator[Access]:
    """Yield the file that an option such as ``-kernel`` names as it is, with commas and colons in its name."""
    if "," in word or ":" in word:
        with contextlib.suppress(OSError, ValueError, RuntimeError):  # the last: links in a circle
            yield Access(Path(word).resolve(strict=True), rights)


def _file(value: str, rights: int) -> Iterator[Access]:
    kind, colon, rest = value.partition(":")
    socket = colon and kind == "unix"
    if colon and kind.isalpha() and rest:
        value = rest
    path = Path(value)
    if "\0" in value or value in ("/", ".", ".."):
        return
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        pass  # perhaps QEMU makes it
    except OSError:
        return  # no name of a file, as with a text of more than 255 bytes; or QEMU cannot use it either
    if path.is_dir():
        if path.is_absolute() or "/" in value:
            yield Access(path, OWN if rights == CHANGE else rights)
    elif path.exists():
        yield Access(path.resolve(), rights)
    elif (path.is_absolute() or "/" in value) and path.parent.is_dir() and rights == CHANGE:
        made = landlock.MAKE_SOCK | landlock.REMOVE_FILE
        yield Access(path.parent, made if socket else made | CHANGE | landlock.MAKE_REG | landlock.MAKE_FIFO)


def _values(word: str) -> Iterator[str]:
    """Yield all values in ``word``: of ``key=value,...``, or all texts of a JSON object."""
    if word.startswith("{"):
        try:
            yield from _texts(json.loads(word))
        except ValueError:
            return
        return
    for part in word.replace(",,", "\0").split(","):
        part = part.replace("\0", ",")
        yield part
        if "=" in part:
            yield part.partition("=")[2]


def _texts(found: object) -> Iterator[str]:
    if isinstance(found, str):
        yield found
    elif isinstance(found, dict):
        for each in found.values():
            yield from _texts(each)
    elif isinstance(found, list):
        for each in found:
            yield from _texts(each)
