"""One QEMU process: its command line, its QMP and qtest sockets, what is found out about it."""
