"""The disk with a Debian system: what is asked of mmdebstrap, and what becomes of its answer."""

from __future__ import annotations

import os
import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path

import pytest
from vmbus.errors import MissingRequirement, UsageError, UserError
from vmbus.provision import cache, system_disk
from vmbus.provision.kernel import find_kernel
from vmbus.provision.mirror import Mirror
from vmbus.provision.progress import Silent

from tests.unit.provision.fake_programs import write_program

MIRROR = Mirror(
    "http://mirror/debian", "http://mirror/security", "/keys/debian.gpg", ('Acquire::Retries "9";',)
)
TOOLS = [name for name in ("mke2fs", "sfdisk") if shutil.which(name, path="/usr/sbin:/sbin") is None]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A cache with the default guest's kernel."""
    stamp = {"release": "6.12-x", "vmlinuz": "vmlinuz", "modules": "modules/6.12-x"}
    with cache.filling(tmp_path / "cache/kernels/debian-6.12/6.12-x", stamp) as temporary:
        (temporary / "vmlinuz").touch()
        (temporary / "modules/6.12-x").mkdir(parents=True)
    return tmp_path / "cache"


def fake_mmdebstrap(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, script: str) -> None:
    """An mmdebstrap that keeps its arguments, one a line, and its input; ``$archive`` is what it has to make."""
    programs = tmp_path / "programs"
    programs.mkdir(exist_ok=True)
    write_program(
        programs / "mmdebstrap",
        f"""if [ "$1" = --unshare-helper ]; then shift; exec "$@"; fi
printf '%s\\n' "$@" >{tmp_path}/arguments; cat >{tmp_path}/sources
while [ "$#" -gt 2 ]; do shift; done; archive=$1
{script}""",
    )
    monkeypatch.setenv("PATH", f"{programs}:/usr/bin:/bin")


@pytest.mark.skipif(bool(TOOLS), reason=f"without {TOOLS}")
def test_the_files_become_a_partition_with_a_file_system(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, folder: Path
) -> None:
    root = tmp_path / "root"
    (root / "etc").mkdir(parents=True)
    (root / "etc/hostname").write_text("debian\n")
    with tarfile.open(tmp_path / "root.tar", "w") as archive:
        archive.add(root, ".")
    fake_mmdebstrap(monkeypatch, tmp_path, f'cp {tmp_path}/root.tar "$archive"')
    with pytest.raises(MissingRequirement, match="vmbus setup --system"):
        system_disk.find_system(folder)
    image = system_disk.make_system(folder, MIRROR, Silent())
    assert image == system_disk.find_system(folder)
    assert (tmp_path / "sources").read_text() == (
        "deb [signed-by=/keys/debian.gpg] http://mirror/debian trixie main\n"
        "deb [signed-by=/keys/debian.gpg] http://mirror/security trixie-security main\n"
    )
    arguments = (tmp_path / "arguments").read_text().splitlines()
    assert '--aptopt=Acquire::Retries "9";' in arguments
    assert any("RELEASE=6.12-x" in line and "PACKAGES=jq" in line for line in arguments)
    with image.open("rb") as file:
        file.seek(446)
        entry, signature = file.read(16), file.read(50)[-2:]
        assert (entry[0], entry[4], entry[8:12], signature) == (0x80, 0x83, b"\0\x08\0\0", b"\x55\xaa")
        file.seek((1 << 20) + 0x438)
        assert file.read(2) == b"\x53\xef"  # ext4
    debugfs = shutil.which("debugfs", path="/usr/sbin:/sbin")
    assert debugfs is not None
    listed = subprocess.run(
        [debugfs, "-R", "cat /etc/hostname", f"{image}?offset={1 << 20}"], capture_output=True, text=True
    )
    assert listed.stdout == "debian\n"
    assert image.stat().st_size == 2 << 30
    assert image.stat().st_blocks * 512 < 64 << 20
    assert list(folder.glob(".system-*")) == []


@pytest.mark.skipif(bool(TOOLS), reason=f"without {TOOLS}")
def test_a_user_without_root_shares_nothing_that_others_can_write(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, folder: Path
) -> None:
    """While the packing runs, as another user in its namespace."""
    root = tmp_path / "root"
    (root / "etc").mkdir(parents=True)
    with tarfile.open(tmp_path / "root.tar", "w") as archive:
        archive.add(root, ".")
    fake_mmdebstrap(monkeypatch, tmp_path, f'cp {tmp_path}/root.tar "$archive"')
    programs = tmp_path / "programs"
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    real = shutil.which("mke2fs", path="/usr/sbin:/sbin")
    look = f"find {temporary} ! -type l -printf '%m %p\\n' >{tmp_path}/modes"
    write_program(programs / "mke2fs", f'{look}; exec {real} "$@"')
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    image = system_disk.make_system(folder, MIRROR, Silent())
    lines = (tmp_path / "modes").read_text().splitlines()
    modes = {path: mode for mode, _, path in (line.partition(" ") for line in lines)}
    assert any("disk.img" in path for path in modes)
    assert {path: mode for path, mode in modes.items() if int(mode, 8) & 0o022} == {}
    assert image.stat().st_mode & 0o777 == 0o644
    assert list(temporary.iterdir()) == []


def test_what_mmdebstrap_says_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, folder: Path) -> None:
    fake_mmdebstrap(monkeypatch, tmp_path, "echo I: hello >&2; echo E: no such suite >&2; exit 25")
    with pytest.raises(UserError, match="mmdebstrap failed: E: no such suite"):
        system_disk.make_system(folder, MIRROR, Silent())
    with pytest.raises(MissingRequirement):
        system_disk.find_system(folder)
    assert list((folder / "systems").iterdir()) == []


def test_a_new_kernel_is_a_new_disk(folder: Path) -> None:
    def made() -> Path:
        guest = find_kernel("debian-6.12", folder)
        return system_disk._place(folder, guest)

    before = made()
    with cache.filling(made(), {}) as temporary:
        (temporary / "disk.img").touch()
    assert system_disk.find_system(folder) == before / "disk.img"
    stamp = {"release": "6.12-y", "vmlinuz": "vmlinuz", "modules": "modules/6.12-y"}
    with cache.filling(folder / "kernels/debian-6.12/6.12-y", stamp) as temporary:
        (temporary / "vmlinuz").touch()
    assert made() != before
    with pytest.raises(MissingRequirement):
        system_disk.find_system(folder)


def test_a_copy_does_not_replace_a_file(tmp_path: Path) -> None:
    image, target = tmp_path / "image", tmp_path / "target"
    image.write_bytes(b"system")
    system_disk.copy_system(image, target)
    assert target.read_bytes() == b"system"
    with pytest.raises(UsageError, match="exists already"):
        system_disk.copy_system(image, target)
    (tmp_path / "link").symlink_to(tmp_path / "planted")
    with pytest.raises(UsageError, match="exists already"):
        system_disk.copy_system(image, tmp_path / "link")
    assert not (tmp_path / "planted").exists()
    with pytest.raises(UserError, match="cannot create"):
        system_disk.copy_system(image, tmp_path / "nowhere/target")
