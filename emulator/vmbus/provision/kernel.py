"""Guest kernels: the named ones that are fetched, and the user's own.

    debian-5.10        Debian 11's cloud kernel
    debian-6.1         Debian 12's cloud kernel
    debian-6.12        Debian 13's cloud kernel (the default guest)
    debian-backports   the newest kernel in Debian 13's backports

Until 6.x one package holds the image and its modules; from 7.x on they are split over several packages of the same
version, which the image package depends on by name. So the packages are found by following those dependencies, and
vmlinuz and modules are taken from whichever of them has them.
"""

from __future__ import annotations

import re
import shutil
import struct
from dataclasses import dataclass
from pathlib import Path

from vmbus.errors import MissingRequirement, UsageError, UserError
from vmbus.provision import cache
from vmbus.provision.apt import Archive, Version

_META_PACKAGE = "linux-image-cloud-amd64"
_BUSYBOX_PACKAGE = "busybox-static"


@dataclass(frozen=True, slots=True)
class GuestName:
    """A named guest: the Debian release it is from, and the suites whose newest kernel it is."""

    name: str
    codename: str
    suites: tuple[str, ...]
    description: str


GUESTS = {
    guest.name: guest
    for guest in (
        GuestName("debian-5.10", "bullseye", ("bullseye", "bullseye-security"), "Linux 5.10 of Debian 11"),
        GuestName("debian-6.1", "bookworm", ("bookworm", "bookworm-security"), "Linux 6.1 of Debian 12"),
        GuestName("debian-6.12", "trixie", ("trixie", "trixie-security"), "Linux 6.12 of Debian 13"),
        GuestName(
            "debian-backports", "trixie", ("trixie-backports",), "newest Linux in Debian 13's backports"
        ),
    )
}
DEFAULT_GUEST = "debian-6.12"


@dataclass(frozen=True, slots=True)
class GuestKernel:
    """A kernel to boot. ``modules`` is the folder that holds ``modules.builtin`` and ``kernel/``, or None."""

    name: str
    release: str
    vmlinuz: Path
    modules: Path | None


def find_kernel(name: str = DEFAULT_GUEST, folder: Path | None = None) -> GuestKernel:
    """Return a named guest that was fetched.

    Raises :class:`UsageError` for an unknown name, :class:`MissingRequirement` for one that was not fetched.
    """
    guest = guest_name(name)
    folder = folder or cache.cache_folder()
    for place, stamp in cache.complete_folders(folder / "kernels" / guest.name):
        kernel = GuestKernel(
            guest.name, str(stamp["release"]), place / str(stamp["vmlinuz"]), place / str(stamp["modules"])
        )
        if kernel.vmlinuz.is_file():
            return kernel
    raise MissingRequirement(
        f"the guest kernel {name} has not been fetched: run `vmbus setup --guest {name}`"
    )


def guest_name(name: str) -> GuestName:
    try:
        return GUESTS[name]
    except KeyError:
        raise UsageError(f"there is no guest {name!r}; there are {', '.join(GUESTS)}") from None


def own_kernel(vmlinuz: Path, modules: Path | None = None) -> GuestKernel:
    """Return the user's kernel; ``modules`` is ``/lib/modules/RELEASE``, or a folder above it.

    Raises :class:`UsageError` if the files are something else, or belong to different releases.
    """
    if not vmlinuz.is_file():
        raise UsageError(f"--kernel {vmlinuz}: there is no such file")
    release = image_release(vmlinuz)
    folder = find_modules(modules, release) if modules is not None else None
    return GuestKernel("own", release or (folder.name if folder else "unknown"), vmlinuz, folder)


def find_modules(folder: Path, release: str = "") -> Path:
    """Return the folder with ``modules.builtin`` or ``kernel/``, at or below ``folder``.

    Raises :class:`UsageError` if there is none.
    """
    candidates = [folder]
    for pattern in ("lib/modules/*", "usr/lib/modules/*", "modules/*", "*"):
        candidates += sorted(folder.glob(pattern))
    found = [
        path for path in candidates if (path / "kernel").is_dir() or (path / "modules.builtin").is_file()
    ]
    if not found:
        raise UsageError(
            f"{folder}: no kernel modules there; expected modules.builtin or kernel/, as in /lib/modules/RELEASE"
        )
    if release:
        same = [path for path in found if path.resolve().name == release]
        if same:
            return same[0]
        if len(found) > 1:
            names = ", ".join(path.name for path in found)
            raise UsageError(f"{folder}: modules of {names}, but the kernel is {release}")
    return found[0]


def image_release(vmlinuz: Path) -> str:
    """Return the release in an x86 bzImage ("6.12.107+deb13-cloud-amd64"); "" for any other file.

    Linux ``Documentation/arch/x86/boot.rst``: "HdrS" at 0x202, offset of the version string less 0x200 at 0x20E.
    """
    with vmlinuz.open("rb") as file:
        head = file.read(0x210)
        if len(head) < 0x210 or head[0x202:0x206] != b"HdrS":
            return ""
        (offset,) = struct.unpack_from("<H", head, 0x20E)
        file.seek(offset + 0x200)
        text = file.read(256).split(b"\0", 1)[0]
    return text.split(b" ", 1)[0].decode("ascii", "replace") if offset else ""


def is_32_bit(vmlinuz: Path) -> bool:
    """Return whether a file is an x86 bzImage of a 32-bit kernel; False where that cannot be told.

    Linux ``Documentation/arch/x86/boot.rst``: from protocol 2.12 on, bit 0 of xloadflags (0x236) is set in 64-bit
    kernels.
    """
    if not vmlinuz.is_file():
        return False
    with vmlinuz.open("rb") as file:
        head = file.read(0x238)
    if len(head) < 0x238 or head[0x202:0x206] != b"HdrS":
        return False
    (protocol,) = struct.unpack_from("<H", head, 0x206)
    (flags,) = struct.unpack_from("<H", head, 0x236)
    return protocol >= 0x20C and not flags & 1


def fetch_kernel(name: str, folder: Path, archive: Archive) -> GuestKernel:
    """Fetch and unpack a named guest's newest kernel. The lock of the cache must be held."""
    guest = guest_name(name)
    image = _image_package(guest, archive)
    parts = _same_release_parts(image, archive)
    files = archive.exact(parts)
    place = folder / "kernels" / guest.name / image.package.removeprefix("linux-image-")
    stamp: dict[str, object] = {"package": image.package, "version": image.version}
    with cache.filling(place, stamp) as temporary:
        archive.unpack(files, temporary)
        kernel = _find_parts(guest.name, temporary)
        stamp["release"] = kernel.release
        stamp["vmlinuz"] = str(kernel.vmlinuz.relative_to(temporary))
        stamp["modules"] = str((kernel.modules or temporary).relative_to(temporary))
        for bulky in ("usr/share/doc", "usr/share/bug", "usr/share/lintian"):
            if bulky != "usr/share/doc":  # the licence stays
                shutil.rmtree(temporary / bulky, ignore_errors=True)
    archive.forget(files)
    for old in place.parent.iterdir():
        if old != place:
            shutil.rmtree(old, ignore_errors=True)
    return find_kernel(name, folder)


def find_busybox(folder: Path | None = None) -> Path:
    """Return the static busybox of the guest's userspace. Raises :class:`MissingRequirement`."""
    folder = folder or cache.cache_folder()
    for place, stamp in cache.complete_folders(folder / "busybox"):
        if (path := place / str(stamp["busybox"])).is_file():
            return path
    raise MissingRequirement("the guest's userspace (busybox) has not been fetched: run `vmbus setup`")


def fetch_busybox(folder: Path, archive: Archive) -> Path:
    """Fetch and unpack busybox. The lock of the cache must be held."""
    offered = archive.versions(_BUSYBOX_PACKAGE)
    if not offered:
        raise MissingRequirement(f"Debian {archive.codename} offers no {_BUSYBOX_PACKAGE}: check the mirror")
    files = archive.exact(offered[:1])
    stamp: dict[str, object] = {"version": offered[0].version}
    with cache.filling(folder / "busybox" / offered[0].version.replace(":", "_"), stamp) as temporary:
        archive.unpack(files, temporary)
        found = [path for path in sorted(temporary.glob("**/bin/busybox")) if path.is_file()]
        if not found:
            raise UserError(
                f"{files[0].name} contains no busybox: run `vmbus setup --update` when the mirror has a newer one"
            )
        stamp["busybox"] = str(found[0].relative_to(temporary))
    archive.forget(files)
    return find_busybox(folder)


def _image_package(guest: GuestName, archive: Archive) -> Version:
    for offered in archive.versions(_META_PACKAGE):
        if offered.suite.split("/")[0] in guest.suites:
            for package, version in _exact_dependencies(archive.field(offered, "Depends")):
                if re.match(r"linux-image-\d", package):
                    return Version(package, version or offered.version, offered.suite)
    raise MissingRequirement(
        f"the archive has no {_META_PACKAGE} in {' or '.join(guest.suites)}, which the guest {guest.name} needs: "
        "check the mirror, or set VMBUS_DEBIAN_MIRROR to another one"
    )


def _same_release_parts(image: Version, archive: Archive) -> list[Version]:
    """Return the image package and all packages of the same version that it depends on."""
    parts = [image]
    for part in parts:
        for field in ("Depends", "Pre-Depends"):
            for package, version in _exact_dependencies(archive.field(part, field)):
                known = Version(package, version, image.suite)
                if version == image.version and known not in parts:
                    parts.append(known)
    return parts


def _exact_dependencies(depends: str) -> list[tuple[str, str]]:
    """Return (package, version) of the dependencies that name an exact version."""
    return re.findall(r"([a-z0-9][a-z0-9.+-]*) \(= ([^)]+)\)", depends)


def _find_parts(name: str, root: Path) -> GuestKernel:
    images = [path for path in sorted(root.glob("**/vmlinuz*")) if path.is_file()]
    folders = [path for path in sorted(root.glob("**/lib/modules/*")) if (path / "modules.builtin").is_file()]
    if not images or not folders:
        raise UserError(
            f"the packages of {name} lack a kernel image or modules, so this version cannot be "
            "used: choose another guest"
        )
    return GuestKernel(name, folders[0].name, images[0], folders[0])
