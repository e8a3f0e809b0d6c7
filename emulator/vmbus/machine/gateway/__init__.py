"""The trap gateway: the TCG plug-in (``plugin/``, C) and the client of its socket and shared memory."""
