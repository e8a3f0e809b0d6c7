"""Migration and snapshots: the emulator's state inside QEMU's own stream (docs/migration.md).

``vmstate`` is the carrier (D-Bus), ``records`` what is saved beside channels, ``machine`` freezes, saves, restores
and thaws a host, ``coordinator`` is the choreography with QEMU.
"""
