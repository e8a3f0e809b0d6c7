"""Small shell programs that stand in for apt, QEMU and busybox."""

from __future__ import annotations

from pathlib import Path

import pytest


def write_program(path: Path, script: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


def only_programs(monkeypatch: pytest.MonkeyPatch, folder: Path, **scripts: str) -> Path:
    """PATH has just these programs (underscores in their names stand for dashes) and the shell's own needs."""
    for name, script in scripts.items():
        write_program(folder / name.replace("_", "-"), script)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    return folder


def fake_qemu(
    path: Path, *, version: str = "11.1.3", plugins: bool = True, qtest: bool = True, dbus: bool = True
) -> Path:
    """Answers what :mod:`vmbus.provision.qemu` asks; writes a line to ``asked`` beside it each time."""
    return write_program(
        path,
        f"""
echo "$*" >>"{path.parent}/asked"
case "$*" in
*--version*) echo "QEMU emulator version {version} (a test)" ;;
*-qtest*) {"cat >/dev/null" if qtest else "echo 'qemu: -qtest: invalid option' >&2; exit 1"} ;;
*help*) {"echo '  dbus-vmstate'" if dbus else ":"}; {"echo '-plugin [file=]<file>'" if plugins else ":"} ;;
*) exit 1 ;;
esac""",
    )
