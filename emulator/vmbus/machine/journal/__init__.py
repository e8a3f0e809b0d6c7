"""Keeps values in memory that outlives this process: a successor reads them after this one was killed.

The memory belongs to somebody else, and is only mapped here. :mod:`vmbus.machine.journal.store` writes it, and
:mod:`vmbus.machine.journal.reading` reads what a predecessor left.
"""
