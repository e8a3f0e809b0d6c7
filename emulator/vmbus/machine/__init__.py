"""All that touches QEMU: its memory, its gateway, its QMP and qtest sockets, its life."""
