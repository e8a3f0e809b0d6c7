"""Which layers of the sandbox this machine has."""

from __future__ import annotations

from dataclasses import dataclass

from vmbus.sandbox import landlock, seccomp


@dataclass(frozen=True, slots=True)
class Layer:
    """One means of confinement; ``lacking`` says what is open without it, and is empty where it is complete."""

    name: str
    there: bool
    found: str
    lacking: str = ""


def layers() -> tuple[Layer, ...]:
    """Return the layers that the kernel decides on."""
    version = landlock.version()
    open_without = [
        what
        for since, what in (
            (3, "files can be truncated"),
            (4, "TCP ports are open"),
            (5, "devices can be controlled"),
            (6, "abstract sockets and signals are open"),
        )
        if 0 < version < since
    ]
    return (
        Layer("no_new_privs", True, "no program gains privileges"),
        Layer("resource limits", True, "no core files; memory of storage daemons"),
        Layer(
            "Landlock",
            version > 0,
            f"version {version}: QEMU and its helpers see only the files that were named"
            if version
            else "not in this kernel, or switched off",
            "; ".join(open_without)
            if version
            else "QEMU and its helpers can open all your files; boot a Linux 5.13 or newer with landlock in lsm=",
        ),
        Layer(
            "seccomp",
            seccomp.available(),
            "system calls that no process needs are refused"
            if seccomp.available()
            else "not in this kernel, or not for this processor",
            "" if seccomp.available() else "the kernel's whole interface is open to QEMU and its helpers",
        ),
    )
