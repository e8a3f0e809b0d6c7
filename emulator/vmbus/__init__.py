"""The VMBus host emulator: plays the Hyper-V host for unmodified guests in a stock QEMU."""

__version__ = "0.1.0"
