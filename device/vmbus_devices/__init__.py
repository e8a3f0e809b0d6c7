"""Synthetic devices: one a file, all on the base in :mod:`vmbus.bus.io.device`.

docs/devices.md says how to write another one; :mod:`vmbus_devices.echo` is the example.
"""
