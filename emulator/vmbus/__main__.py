"""``python -m vmbus`` is the command ``vmbus``."""

import sys

from vmbus.cli import main

if __name__ == "__main__":
    sys.exit(main())
