"""The fast path of disks: ordinary reads and writes in compiled code, from the ring to the file and back.

shared     the structures and constants that C and Python share, and the C header made from them
build      the C sources as a library, with a header made from the packets' declarations
path       the library seen from Python: units, channels
units      the units of one controller that may take the fast path

``fastpath.h`` says what the C files (``take.c``, ``complete.c``, ``fastpath.c``) do for the engine.
"""
