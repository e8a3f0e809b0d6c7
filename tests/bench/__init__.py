"""Benchmarks: ``make bench``, or ``python -m tests.bench [NAME ...] [--json]``. They report and never judge."""
