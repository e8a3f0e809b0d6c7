"""Replaces the process that serves a guest, while QEMU and its guest go on (docs/restart.md)."""
