"""Options and other words of a verb in any order, as in ``vmbus snapshot save web --json before``."""

from __future__ import annotations

import argparse
from typing import Any


class VerbParser(argparse.ArgumentParser):
    """Parses the words of one verb; those that have no actions take options before, between and behind the words.

    :class:`argparse.ArgumentParser` gives an optional word its default as soon as an option comes: the words behind
    that option are then too many, or are taken for others.
    """

    _under_way = False

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        # The standard method for any order calls this one for its two steps, except in newer versions of Python.
        if self._under_way or self._subparsers is not None:
            return super().parse_known_args(args, namespace)
        self._under_way = True
        try:
            return self.parse_known_intermixed_args(args, namespace)
        finally:
            self._under_way = False
