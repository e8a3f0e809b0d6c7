"""What the emulator needs from outside: QEMU, guest kernels, an initramfs, and how to get them.

This package has nothing to do with VMBus traffic; it imports only :mod:`vmbus.errors`. Everything is kept in one
cache folder (:mod:`vmbus.provision.cache`), which can be deleted at any time; ``vmbus setup`` fills it again.
"""
