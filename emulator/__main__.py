"""``python -m emulator`` is the command ``vmbus``."""

import sys

from emulator.cli import main

if __name__ == "__main__":
    sys.exit(main())
