"""Confinement of the processes that face a guest or an image: Landlock, seccomp, no_new_privs, resource limits.

Everything here is used where the kernel has it and left out where it has not (:mod:`vmbus.sandbox.report`).
"""
