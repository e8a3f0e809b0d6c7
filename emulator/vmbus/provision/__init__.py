"""What the emulator needs from outside: QEMU, guest kernels, an initramfs, and how to get them.

Nothing here knows VMBus traffic; it imports only :mod:`vmbus.errors`. Everything lives in one cache folder
(:mod:`vmbus.provision.cache`), can be deleted at any time, and is made again by ``vmbus setup``.
"""
