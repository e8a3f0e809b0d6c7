"""``vmbus setup``: fetch what is missing. A second run has nothing to do and does not use the network."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vmbus.errors import MissingRequirement
from vmbus.provision import cache, firmware, kernel, qemu, system_disk, system_packages
from vmbus.provision.apt import Archive
from vmbus.provision.mirror import Mirror, find_mirror
from vmbus.provision.progress import Progress, for_stream


@dataclass(frozen=True, slots=True)
class Provisions:
    """What a setup has provided."""

    qemu: qemu.QemuBinary
    kernels: tuple[kernel.GuestKernel, ...]
    busybox: Path


class Setup:
    """One setup of the cache ``folder``; by default ``progress`` is shown if standard error is a terminal."""

    def __init__(self, folder: Path | None = None, progress: Progress | None = None) -> None:
        self.folder = folder or cache.cache_folder()
        self._progress = progress or for_stream()
        self._mirror: Mirror | None = None
        self._archives: dict[str, Archive] = {}

    def run(self, guests: Sequence[str] = (kernel.DEFAULT_GUEST,), *, update: bool = False) -> Provisions:
        """Fetch QEMU, busybox and ``guests`` unless they exist; with ``update``, fetch newer versions.

        Raises :class:`~vmbus.errors.UserError` with what to do; everything fetched until then is kept.
        """
        for name in guests:
            kernel.guest_name(name)
        found = self._fetch(guests, update)
        # Last, so that packages that a person has to install do not delay the downloads.
        system_packages.ensure(system_packages.BUILD_PACKAGES)
        return found

    def system(self, *, update: bool = False) -> Path:
        """Return the image of a disk with a Debian system; create it if it does not exist, or if ``update``.

        Raises as :meth:`run`. The tools for it are installed if that is allowed (:mod:`.system_packages`).
        """
        if not update:
            try:
                return system_disk.find_system(self.folder)
            except MissingRequirement:
                pass  # created below
        self.run()
        system_packages.ensure(system_packages.SYSTEM_PACKAGES)
        with cache.locked(self.folder, lambda: self._progress.step("waiting for another setup to end")):
            cache.sweep(self.folder / "systems")
            try:
                return self._system(update)
            finally:
                self._progress.finish()

    def firmware(self, *, update: bool = False) -> Path:
        """Return the UEFI firmware for guests; fetch it if there is none, or if ``update``. Raises as :meth:`run`."""
        if not update:
            try:
                return firmware.find_firmware(self.folder)
            except MissingRequirement:
                pass  # fetched below
        with cache.locked(self.folder, lambda: self._progress.step("waiting for another setup to end")):
            cache.sweep(self.folder / "firmware")
            try:
                return firmware.fetch_firmware(self.folder, self._archive(firmware.SUITE))
            finally:
                self._tidy()

    def _system(self, update: bool) -> Path:
        if not update:
            try:
                return system_disk.find_system(self.folder)  # another setup created it meanwhile
            except MissingRequirement:
                pass
        return system_disk.make_system(self.folder, self._mirror or find_mirror(), self._progress)

    def _fetch(self, guests: Sequence[str], update: bool) -> Provisions:
        if not update and (there := self._there(guests)) is not None:
            return there
        with cache.locked(self.folder, lambda: self._progress.step("waiting for another setup to end")):
            for place in ("qemu", "busybox", *(f"kernels/{name}" for name in guests)):
                cache.sweep(self.folder / place)
            try:
                return Provisions(
                    qemu=self._qemu(update),
                    busybox=self._busybox(update),
                    kernels=tuple(self._kernel(name, update) for name in guests),
                )
            finally:
                self._tidy()

    def _tidy(self) -> None:
        for archive in self._archives.values():
            archive.tidy()
        self._progress.finish()

    def _there(self, guests: Sequence[str]) -> Provisions | None:
        try:
            return Provisions(
                qemu=qemu.find_qemu(self.folder),
                busybox=kernel.find_busybox(self.folder),
                kernels=tuple(kernel.find_kernel(name, self.folder) for name in guests),
            )
        except MissingRequirement:
            return None

    def _qemu(self, update: bool) -> qemu.QemuBinary:
        try:
            found = qemu.find_qemu(self.folder)
        except MissingRequirement:
            if os.environ.get("VMBUS_QEMU"):
                raise  # the user's choice; another QEMU would not be used
            return qemu.fetch_qemu(self.folder, self._archive(qemu.SUITE))
        if update and found.origin == "private":
            return qemu.fetch_qemu(self.folder, self._archive(qemu.SUITE))
        return found

    def _busybox(self, update: bool) -> Path:
        try:
            if not update:
                return kernel.find_busybox(self.folder)
        except MissingRequirement:
            pass  # fetched below
        return kernel.fetch_busybox(self.folder, self._archive("trixie"))

    def _kernel(self, name: str, update: bool) -> kernel.GuestKernel:
        try:
            if not update:
                return kernel.find_kernel(name, self.folder)
        except MissingRequirement:
            pass  # fetched below
        return kernel.fetch_kernel(name, self.folder, self._archive(kernel.guest_name(name).codename))

    def _archive(self, codename: str) -> Archive:
        if codename not in self._archives:
            if self._mirror is None:
                self._mirror = find_mirror()
            folder = self.folder / "apt" / codename
            backports = codename == qemu.SUITE or any(
                f"{codename}-backports" in guest.suites for guest in kernel.GUESTS.values()
            )
            archive = Archive(folder, codename, self._mirror, self._progress, backports=backports)
            archive.refresh()
            self._archives[codename] = archive
        return self._archives[codename]
