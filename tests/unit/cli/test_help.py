"""The help of every verb, and of every action of a verb, has examples of it that can be typed as they are."""

from __future__ import annotations

import argparse
import re
import shlex
from collections.abc import Iterator

import pytest
from vmbus.cli import parser, with_values


def commands(root: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    """The parsers of all verbs and of their actions."""
    for action in root._actions:
        if isinstance(action, argparse._SubParsersAction):
            for each in action.choices.values():
                yield each
                yield from commands(each)


COMMANDS = {each.prog: each for each in commands(parser())}


def examples(command: argparse.ArgumentParser) -> list[str]:
    """The command lines under ``examples:``, without what is said beside them."""
    _, _, text = command.format_help().partition("examples:\n")
    lines = [line.strip().rpartition("&& ")[2] for line in text.partition("\n\n")[0].splitlines()]
    return [re.split(" {2,}", line)[0] for line in lines if line.startswith("vmbus ")]


def test_actions_are_among_the_commands() -> None:
    assert {"vmbus run", "vmbus device", "vmbus device add", "vmbus channel dump"} <= COMMANDS.keys()


@pytest.mark.parametrize("name", COMMANDS)
def test_help_has_an_example_of_the_command(name: str) -> None:
    found = examples(COMMANDS[name])
    assert any(f"{each} ".startswith(f"{name} ") for each in found), found
    if name.count(" ") == 2:  # an action: the others have a help of their own
        assert all(f"{each} ".startswith(f"{name} ") for each in found), found


@pytest.mark.parametrize(
    "line", sorted({each for command in COMMANDS.values() for each in examples(command)})
)
def test_an_example_can_be_typed(line: str) -> None:
    line = re.split(r"[|]|\d<>|\$\(", line)[0].removesuffix("...")  # what the shell does is not looked at
    words = shlex.split(line)[1:]
    parser().parse_args(with_values(words[: words.index("--")] if "--" in words else words))
