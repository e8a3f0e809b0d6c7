"""Makes a small ``lib/modules/RELEASE`` for the tests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.unit.provision.elf_writer import kernel_module

RELEASE = "6.99.1-test"
HEARTBEAT_ALIAS = "alias=vmbus:394f16571591784eab55382f3bd5422d"
SCSI_ALIAS = "alias=vmbus:d96361baa104294db60572e2ffb1dc7f"


class KernelFolder:
    """``folder`` is where the modules are; the same module may be written as loadable or as linked in."""

    def __init__(self, root: Path) -> None:
        self.folder = root / "lib/modules" / RELEASE
        (self.folder / "kernel").mkdir(parents=True)
        self._builtin: dict[str, Sequence[str]] = {}
        self._save()

    def module(self, place: str, *entries: str, depends: str = "", release: str = RELEASE) -> Path:
        """A loadable module at ``place`` ("kernel/drivers/hv/hv_vmbus.ko")."""
        path = self.folder / place
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(kernel_module(f"depends={depends}", f"vermagic={release} SMP mod_unload ", *entries))
        return path

    def builtin(self, name: str, *entries: str) -> None:
        self._builtin[name] = entries
        self._save()

    def _save(self) -> None:
        lines = "".join(f"kernel/drivers/{name}.ko\n" for name in self._builtin)
        (self.folder / "modules.builtin").write_text(lines)
        (self.folder / "modules.builtin.modinfo").write_text(_modinfo(self._builtin))


def _modinfo(modules: Mapping[str, Sequence[str]]) -> str:
    return "".join(f"{name}.{entry}\0" for name, entries in modules.items() for entry in entries)
