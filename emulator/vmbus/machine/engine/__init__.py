"""Compiled code that touches memory which the guest, its vCPUs and this process change at the same time.

The parts, in C but for the last five; ``vmbus/engine_device.h`` is what a device brings::

    signals.c    event flags, and interrupts that a vCPU raises by itself; all devices use it
    engine.c     a thread that owns the rings of fast channels (docs/decisions/0006-native-data-path.md)
    rings.c      its rings and signals
    requests.c   its requests, and their mirror, which outlives the process
    uring.c      its io_uring
    layout       what C and Python share
    library      signals.c, seen from Python
    thread       engine.c, seen from Python
    data_path    the engine as devices use it
    mirror       what a successor finds in the mirror
"""
