"""The plug-in is compiled once a version, and says what is missing."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from vmbus import native
from vmbus.errors import MissingRequirement
from vmbus.machine.gateway import build as gateway_build


def test_the_library_is_built_once_and_shows_only_the_entry_points(tmp_path: Path) -> None:
    library = gateway_build.build(tmp_path)
    assert library.parent == tmp_path
    assert library.name.startswith("vmbus-gateway-")
    built = library.stat().st_mtime_ns
    assert gateway_build.build(tmp_path) == library
    assert library.stat().st_mtime_ns == built
    assert list(tmp_path.iterdir()) == [library]
    symbols = subprocess.run(
        ["nm", "-D", "--defined-only", library], check=True, capture_output=True, text=True
    ).stdout.split("\n")
    shown = {line.split()[-1] for line in symbols if line}
    assert shown == {"qemu_plugin_install", "qemu_plugin_version"}


def test_without_a_compiler_the_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    with pytest.raises(MissingRequirement, match="apt-get install gcc"):
        gateway_build.build(tmp_path)


def test_the_cache_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VMBUS_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert gateway_build.library_path().parent == Path("/x/vmbus")
    monkeypatch.setenv("VMBUS_CACHE", "/y")
    assert gateway_build.library_path().parent == Path("/y")


@pytest.mark.parametrize("source", sorted(gateway_build.SOURCE.glob("*.c")), ids=lambda path: path.name)
def test_the_source_compiles_without_a_warning(source: Path, tmp_path: Path) -> None:
    command = [
        native.compiler(),
        *native.FLAGS,
        "-Werror",
        "-c",
        "-o",
        str(tmp_path / "object.o"),
        str(source),
    ]
    assert subprocess.run(command, check=False, capture_output=True, text=True).stderr == ""
