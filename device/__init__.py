"""Synthetic devices: one a file, all on the base in :mod:`emulator.bus.device`.

docs/devices.md says how to write another one; :mod:`device.echo` is the example.
"""
