"""Child processes: whose session, process group and terminal they have."""

from __future__ import annotations

import fcntl
import os
import pty
import subprocess
import sys
import termios

CHILD = """
import os
try:
    os.open("/dev/tty", os.O_RDWR)
    terminal = "a terminal"
except OSError:
    terminal = "no terminal"
print(os.getsid(0) == os.getsid(os.getppid()), os.getpgid(0) == os.getpid(), terminal)
"""
PARENT = f"""
import os, subprocess, sys
from vmbus.machine.qemu.child import in_child
os.close(os.open("/dev/tty", os.O_RDWR))  # there is one
with in_child(None) as prepare:
    subprocess.run([sys.executable, "-c", {CHILD!r}], preexec_fn=prepare, check=True)
"""


def test_a_child_is_in_the_session_and_has_no_terminal_and_no_ctrl_c() -> None:
    """In a session of its own it would get its processor time apart from the emulator's."""
    ours, theirs = pty.openpty()
    try:
        done = subprocess.run(
            [sys.executable, "-c", PARENT],
            stdout=subprocess.PIPE,
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(theirs, termios.TIOCSCTTY, 0),
            pass_fds=(theirs,),
            text=True,
            check=True,
            timeout=60,
        )
    finally:
        os.close(ours)
        os.close(theirs)
    assert done.stdout.split() == ["True", "True", "no", "terminal"]
