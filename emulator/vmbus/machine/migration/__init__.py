"""Migration and snapshots: the emulator's state inside QEMU's own stream (docs/migration.md).

``state_machine`` decides what the emulator does in a migration, without I/O; ``coordinator`` connects it to QEMU.
``host_state`` pauses, saves, restores and resumes a host, ``vmstate`` and ``side_channel`` carry its state, and
``dirty_pages``, ``carried_pages`` and ``shared_memory`` see to guest memory. ``drive`` and ``snapshots`` make QEMU
migrate, or save. ``ports`` has what they use of the machine.
"""
