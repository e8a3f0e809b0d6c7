"""Test doubles for devices and guests: fakes of :mod:`vmbus.ports`, a loopback guest, a scripted guest."""
