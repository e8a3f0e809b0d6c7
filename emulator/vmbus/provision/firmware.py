"""UEFI firmware for guests: OVMF, of this machine or of Debian's package ``ovmf``.

    this machine has one     that one
    fetched by a setup       that one
    else                     MissingRequirement: run `vmbus setup --firmware`

The image holds code and variables in one file, or the code alone: then, too, what the guest writes into variables
lasts until QEMU ends.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from vmbus.errors import MissingRequirement, UserError
from vmbus.provision import cache
from vmbus.provision.apt import Archive

NAME = "ovmf"
SUITE = "trixie"
_IMAGE = Path("usr/share/ovmf/OVMF.fd")
_INSTALLED = (
    Path("/usr/share/ovmf/OVMF.fd"),
    Path("/usr/share/OVMF/OVMF_CODE_4M.fd"),
    Path("/usr/share/OVMF/OVMF_CODE.fd"),
    Path("/usr/share/edk2/ovmf/OVMF_CODE.fd"),
    Path("/usr/share/edk2/x64/OVMF.4m.fd"),
)
"""Where Debian, Fedora and Arch Linux have it: builds that work without SMM."""


def find_firmware(folder: Path | None = None, installed: Sequence[Path] = _INSTALLED) -> Path:
    """Return an image of OVMF; ``folder`` is the cache folder. Raises :class:`MissingRequirement` with what to do."""
    for path in installed:
        if path.is_file():
            return path
    for place, stamp in cache.complete_folders((folder or cache.cache_folder()) / "firmware"):
        if (path := place / str(stamp["image"])).is_file():
            return cache.check(path)
    raise MissingRequirement(
        "there is no OVMF on this machine: run `vmbus setup --firmware`, or name an image with --firmware FILE"
    )


def fetch_firmware(folder: Path, archive: Archive) -> Path:
    """Fetch and unpack OVMF. The lock of the cache must be held."""
    offered = archive.versions(NAME)
    if not offered:
        raise MissingRequirement(f"Debian {archive.codename} offers no package {NAME}: check the mirror")
    place = folder / "firmware" / f"{NAME}-{offered[0].version.replace(':', '_')}"
    files = archive.exact(offered[:1])
    with cache.filling(place, {"version": offered[0].version, "image": str(_IMAGE)}) as temporary:
        archive.unpack(files, temporary)
        if not (temporary / _IMAGE).is_file():
            raise UserError(
                f"{files[0].name} has no {_IMAGE}: run `vmbus setup --firmware --update` when the mirror has another"
            )
    archive.forget(files)
    for old in place.parent.iterdir():
        if old != place:
            shutil.rmtree(old, ignore_errors=True)
    return place / _IMAGE
