"""Declarations of everything that crosses a border, one module a subject. Imports nothing but ``errors``.

Each layout is declared once, with ``construct`` (see :mod:`vmbus.wire.codec`), and is turned there into a
frozen dataclass's codec; where packets are parsed millions of times a ``struct.Struct`` is derived from the
declaration.
"""
