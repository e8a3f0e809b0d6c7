"""Reads and writes that would block the event loop: worker threads, io_uring, compiled code."""
