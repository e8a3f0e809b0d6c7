"""A disk with a whole Debian system: systemd, apt, a compiler, fio, sg3-utils, and the modules of the default guest.

    mmdebstrap --(packages of the machine's own mirror)--> tar --> files --(mke2fs -d)--> a file system at 1 MiB
    sfdisk     --------------------------------------------------------------------->   the partition around it

The disk is made once and kept in the cache under a key of its recipe; who uses it copies it. Nothing is mounted for
it, and no loop device is needed. As root mmdebstrap works in a chroot, otherwise in a user namespace (which takes
``uidmap``, and an entry in ``/etc/subuid``).
"""

from __future__ import annotations

import hashlib
import os
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import IO, Any

from vmbus.errors import MissingRequirement, UsageError, UserError
from vmbus.provision import cache, kernel
from vmbus.provision.apt import DownloadError
from vmbus.provision.mirror import Mirror
from vmbus.provision.progress import Progress

PACKAGES = (
    *("apt", "debian-archive-keyring", "systemd-sysv", "udev", "dbus", "kmod", "login", "passwd", "mount"),
    *("util-linux", "fdisk", "e2fsprogs", "procps", "gcc", "libc6-dev", "fio", "sg3-utils"),
)
REPOSITORY = ("jq", "libjq1", "libonig5")
"""Packages in a repository inside the system, not installed: apt can install them without a network.

``jq`` needs the other two.
"""

ROOT_PARTITION = 1
"""The partition of the root file system: ``/dev/sda1`` if the disk is ``/dev/sda``."""

_SIZE = 2 << 30
_START = 1 << 20
_FORMAT = 1
_HOOK = resources.files("vmbus.provision").joinpath("debian-system")
_LEFT_OUT = ("/usr/share/man/*", "/usr/share/doc/*", "/usr/share/info/*", "/usr/share/locale/*")


def find_system(folder: Path | None = None) -> Path:
    """Return the image in the cache ``folder``.

    Raises :class:`MissingRequirement` if the image or its kernel is missing.
    """
    folder = folder or cache.cache_folder()
    image = _place(folder, kernel.find_kernel(kernel.DEFAULT_GUEST, folder)) / "disk.img"
    if cache.read_stamp(image.parent) is None or not image.is_file():
        raise MissingRequirement("the Debian system disk has not been created: run `vmbus setup --system`")
    return image


def make_system(folder: Path, mirror: Mirror, progress: Progress) -> Path:
    """Create and return the image. The default guest's kernel must exist, and the lock of the cache be held.

    Raises :class:`~vmbus.provision.apt.DownloadError`, or :class:`UserError` where a tool fails.
    """
    guest = kernel.find_kernel(kernel.DEFAULT_GUEST, folder)
    if guest.modules is None:
        raise UserError(
            f"the kernel {guest.release} has no modules: fetch it again with `vmbus setup --guest "
            f"{guest.name} --update`"
        )
    place = _place(folder, guest)
    progress.step(f"making a disk with Debian {_codename()} ({len(PACKAGES)} packages and what they need)")
    stamp: dict[str, object] = {"kernel": guest.release, "packages": list(PACKAGES)}
    with (
        cache.filling(place, stamp) as temporary,
        # a user's namespace has no access to the cache
        tempfile.TemporaryDirectory(prefix=".system-", dir=None if os.geteuid() else folder) as name,
    ):
        work = Path(name)
        work.chmod(0o755)
        archive = work / "root.tar"
        _run([*_mmdebstrap(mirror, guest, work), _codename(), str(archive), "-"], _sources(mirror, work))
        progress.step("packing the disk")
        image = work / "disk.img"
        _pack(archive, image)
        shutil.move(image, temporary / "disk.img")
    for old in place.parent.iterdir():
        if old != place:
            shutil.rmtree(old, ignore_errors=True)
    return find_system(folder)


def copy_system(image: Path, target: Path) -> None:
    """Copy ``image`` to ``target``, as a disk for a guest. Raises :class:`UsageError` if ``target`` exists."""
    try:
        file = os.open(target, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    except FileExistsError:  # a link, too: it may have been put there for this
        raise UsageError(f"{target} exists already: remove it, or name another file") from None
    except OSError as error:
        raise UserError(f"cannot create {target}: {error.strerror}") from error
    try:
        command = ["cp", "--reflink=auto", "--sparse=always", str(image), f"/proc/self/fd/{file}"]
        done = subprocess.run(command, capture_output=True, text=True, pass_fds=(file,))
    finally:
        os.close(file)
    if done.returncode:
        target.unlink(missing_ok=True)
        raise UserError(f"cannot create {target}: {done.stderr.strip()}")


def _codename() -> str:
    return kernel.guest_name(kernel.DEFAULT_GUEST).codename


def _place(folder: Path, guest: kernel.GuestKernel) -> Path:
    recipe = (_FORMAT, _SIZE, _START, _codename(), PACKAGES, REPOSITORY, _LEFT_OUT, guest.release)
    key = hashlib.sha256(repr(recipe).encode() + _HOOK.read_bytes()).hexdigest()[:16]
    return folder / "systems" / key


def _sources(mirror: Mirror, work: Path) -> str:
    """Return apt's sources for a system from the machine's own mirror."""
    keyring = mirror.keyring
    if "BEGIN PGP" in keyring:
        path = work / "archive.asc"
        path.write_text(keyring)
        keyring = str(path)
    option = f"[signed-by={keyring}] " if keyring else ""
    lines = [f"deb {option}{mirror.main} {_codename()} main"]
    if mirror.security:
        lines.append(f"deb {option}{mirror.security} {_codename()}-security main")
    return "\n".join(lines) + "\n"


def _mmdebstrap(mirror: Mirror, guest: kernel.GuestKernel, work: Path) -> list[str]:
    hook = work / "debian-system"
    hook.write_bytes(_HOOK.read_bytes())
    hook.chmod(0o755)
    hook_line = shlex.join(["env", f"RELEASE={guest.release}", f"PACKAGES={' '.join(REPOSITORY)}", str(hook)])
    return [
        "mmdebstrap",
        "--quiet",
        f"--mode={'unshare' if os.geteuid() else 'root'}",
        "--variant=apt",
        "--format=tar",
        f"--include={','.join(PACKAGES)}",
        "--dpkgopt=force-unsafe-io",
        *(f"--dpkgopt=path-exclude={pattern}" for pattern in _LEFT_OUT),
        '--aptopt=Acquire::Languages "none"',
        *(f"--aptopt={setting}" for setting in mirror.settings),
        '--customize-hook=mkdir -p "$1/usr/lib/modules"',
        f"--customize-hook=copy-in {shlex.quote(str(guest.modules))} /usr/lib/modules",
        f'--customize-hook={hook_line} "$1"',
    ]


def _pack(archive: Path, image: Path) -> None:
    """Make the partitioned ``image`` of the files in ``archive``, as the user who owns all of them."""
    # The user of the namespace is another one: it gets the archive and the image as open files, and works in a
    # folder of its own. Nothing of this user's is writable for others at any time.
    script = (
        'set -e; umask 022; work=$(mktemp -d -p "$4"); trap \'rm -rf "$work"\' EXIT; mkdir "$work/root"; '
        "tar -x -p --numeric-owner --exclude='./dev/*' -f - -C \"$work/root\"; "
        ': >"$work/root/etc/machine-id"; '  # every boot of a new copy makes its own
        'truncate -s "$1" "$work/image"; '
        'mke2fs -q -t ext4 -L debian -d "$work/root" -E "offset=$2,assume_storage_prezeroed=1" "$work/image" "$3k"; '
        'rm -rf "$work/root"; dd if="$work/image" bs=64K conv=sparse status=none'
    )
    folder = tempfile.gettempdir() if os.geteuid() else str(image.parent)
    words = ["sh", "-c", script, "pack", str(_SIZE), str(_START), str((_SIZE - _START) >> 10), folder]
    if os.geteuid():
        words = ["mmdebstrap", "--unshare-helper", *words]
    with (
        archive.open("rb") as files,
        os.fdopen(os.open(image, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o644), "wb") as made,
    ):
        _run(words, files, made)
    archive.unlink()
    os.truncate(image, _SIZE)
    _run(["sfdisk", "--quiet", str(image)], f"label: dos\nstart={_START // 512}, type=83, bootable\n")


def _run(
    command: Sequence[str], given: str | IO[bytes] = "", output: int | IO[bytes] = subprocess.PIPE
) -> None:
    """Run a tool; ``given`` is its input, ``output`` takes its standard output."""
    environment: Mapping[str, str] = {**os.environ, "LC_ALL": "C.UTF-8", "PATH": _path()}
    source: dict[str, Any] = {"input": given} if isinstance(given, str) else {"stdin": given}
    try:
        done = subprocess.run(
            command,
            **source,
            env=environment,
            stdout=output,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
        )
    except FileNotFoundError:
        raise MissingRequirement(
            f"there is no {command[0]} on this machine: install the packages mmdebstrap, e2fsprogs and fdisk"
        ) from None
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.startswith(("E:", "W:", "dpkg: error"))]
        reason = "; ".join(lines[-4:]) or done.stderr.strip()[-400:] or "no reason given"
        kind = DownloadError if command[0] == "mmdebstrap" else UserError
        raise kind(f"{command[0]} failed: {reason}")


def _path() -> str:
    """Return PATH with the folders of mke2fs and sfdisk, which a user's PATH often lacks."""
    return f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin"
