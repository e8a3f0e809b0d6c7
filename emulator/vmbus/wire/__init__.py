"""Declarations of all layouts that are shared with a guest, a file or another process, one module per subject.

Each layout is declared once, with ``construct``; :mod:`vmbus.wire.codec` binds it to a frozen dataclass. Where
packets are parsed millions of times, a ``struct.Struct`` is derived from the declaration. The package imports only
:mod:`vmbus.errors` of this project.
"""
