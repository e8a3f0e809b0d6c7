"""Verbs with actions (``vmbus device add``): how their parsers are made, and the help of each action."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

GUEST_NAME = "name of the guest (not needed if only one is served)"
"""Help of an optional argument ``name``."""


def add_verb(verbs: Any, verb: str, text: str, description: str, epilog: str) -> argparse.ArgumentParser:
    """Add ``verb`` to those of the command line, and return its parser.

    ``text``: in a few words, for the list of verbs; ``description`` and ``epilog``: above and below its options.
    """
    parser: argparse.ArgumentParser = verbs.add_parser(
        verb,
        help=text,
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    return parser


def add_actions(
    parser: argparse.ArgumentParser, dest: str, actions: Mapping[str, str], epilog: str
) -> dict[str, argparse.ArgumentParser]:
    """Add ``actions`` (each with what it does, the verb first) to a verb; return the parser of each.

    ``dest``: where the chosen one is stored. An action's help has those of the examples in ``epilog`` that show it,
    and the notes behind the examples.
    """
    added = parser.add_subparsers(dest=dest, metavar="ACTION", required=True)
    return {
        action: add_verb(
            added, action, text, f"{text[0].upper()}{text[1:]}.", _about(f"{parser.prog} {action}", epilog)
        )
        for action, text in actions.items()
    }


def _about(command: str, epilog: str) -> str:
    examples, _, notes = epilog.partition("\n\n")
    title, *lines = examples.splitlines()
    shown = [line for line in lines if f"{line.strip()} ".startswith(f"{command} ")]
    return "\n".join([title, *shown, "", notes])
