"""A real QEMU in its sandbox is told to open what it must not, by a client of its QMP socket."""

from __future__ import annotations

from pathlib import Path

import pytest
from vmbus.errors import QemuError
from vmbus.machine.qemu import confined
from vmbus.machine.qemu.launch import QemuProcess
from vmbus.provision.qemu import find_qemu
from vmbus.sandbox import landlock, seccomp
from vmbus.sandbox.confinement import Confinement

pytestmark = pytest.mark.qemu


def node(path: Path, name: str) -> dict[str, object]:
    return {"driver": "file", "filename": str(path), "node-name": name, "read-only": True}


@pytest.mark.parametrize("inside", [True, False])
async def test_qemu_opens_what_was_named_and_nothing_else(tmp_path: Path, inside: bool) -> None:
    own = tmp_path / "own"
    own.mkdir(mode=0o700)
    (tmp_path / "later").mkdir()
    for name in ("secret", "named", "later/allowed"):
        (tmp_path / name).write_bytes(bytes(4096))
    qemu = find_qemu()
    line = [*qemu.argv_prefix, "-machine", "none", "-nodefaults", "-display", "none"]
    line += ["-qmp", f"unix:{own}/qmp.sock,server=on,wait=off"]
    line += ["-blockdev", f"driver=file,filename={tmp_path}/named,node-name=named,read-only=on"]
    limits: Confinement | None = None
    if inside:
        line += confined.qemu_filter(line)
        limits = confined.qemu(qemu.argv_prefix, line, own, [tmp_path / "later"])
    process = QemuProcess.start(line, own / "log", qemu.environment, limits)
    try:
        qmp = await process.connect_qmp(own / "qmp.sock")
        status = Path(f"/proc/{process.pid}/status").read_text()
        assert f"NoNewPrivs:\t{inside:d}" in status
        if inside and seccomp.available():
            assert "Seccomp:\t2" in status
        await qmp.execute("blockdev-add", dict(node(tmp_path / "named", "again")))
        await qmp.execute("blockdev-add", dict(node(tmp_path / "later/allowed", "allowed")))
        if inside and landlock.version():
            with pytest.raises(QemuError, match="Permission denied"):
                await qmp.execute("blockdev-add", dict(node(tmp_path / "secret", "secret")))
            with pytest.raises(QemuError, match="Permission denied"):
                await qmp.execute(
                    "chardev-add",
                    {"id": "log", "backend": {"type": "file", "data": {"out": str(tmp_path / "made")}}},
                )
        else:
            await qmp.execute("blockdev-add", dict(node(tmp_path / "secret", "secret")))
        await qmp.close()
    finally:
        process.stop()
