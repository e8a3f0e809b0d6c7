"""``vmbus`` as a user types it: a process of its own, which can die alone."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vmbus.errors import UserError
from vmbus.machine.control import ask

from tests.guest.waiting import Side, end_of, section, until

LIMIT = 120.0
_numbers = itertools.count()


class Emulator:
    """``vmbus WORDS``; its run directories are in ``folder``, and so are the files that it prints to.

    As a :class:`~tests.guest.waiting.Side` it ends with its process.
    """

    def __init__(
        self, process: subprocess.Popen[bytes], folder: Path, words: Sequence[str], log: Path
    ) -> None:
        self.process = process
        self.folder = folder
        self.words = words
        self._log = log

    @classmethod
    def start(
        cls,
        folder: Path,
        *words: str,
        dies: str = "",
        descriptors: Sequence[int] = (),
        logs: Path | None = None,
    ) -> Emulator:
        """Start it. ``dies``: a moment of ``tests.migration.mortal``; ``descriptors`` of this process go along.

        ``logs``: where its output goes, if not to ``folder``.
        """
        module = ["tests.migration.mortal", dies] if dies else ["vmbus"]
        log = (logs or folder) / f"vmbus-{next(_numbers)}"
        # Files, not pipes: nothing blocks while nothing reads, and a failure can show them at any time.
        with log.with_suffix(".out").open("wb") as output, log.with_suffix(".err").open("wb") as errors:
            process = subprocess.Popen(
                [sys.executable, "-m", *module, *words],
                env={**os.environ, "XDG_RUNTIME_DIR": str(folder)},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=errors,
                pass_fds=descriptors,
            )
        return cls(process, folder, words, log)

    @property
    def output_bytes(self) -> bytes:
        """What it has printed to its standard output so far."""
        return self._log.with_suffix(".out").read_bytes()

    @property
    def output(self) -> str:
        """The same, as text."""
        return self.output_bytes.decode(errors="replace")

    @property
    def errors(self) -> str:
        """What it has printed to its standard error so far."""
        return self._log.with_suffix(".err").read_text(errors="replace")

    # --- a side of a wait ---

    def gone(self) -> str:
        status = self.process.poll()
        if status is None:
            return ""
        return f"`vmbus {' '.join(self.words)}` ended with status {status}: {self.errors.strip() or 'no message'}"

    def report(self) -> str:
        parts = [f"=== vmbus {' '.join(self.words)} (process {self.process.pid}) ==="]
        parts += [section(f"std{kind}", end_of(self._log.with_suffix(f".{kind}"))) for kind in ("out", "err")]
        if self.process.poll() is None and (name := self._name()):
            control = self.folder / "vmbus" / name / "control.sock"
            try:
                found = json.dumps(ask(control, "status", answer_timeout=5), indent=1)
            except UserError as error:
                found = str(error)
            parts.append(section("vmbus status", found))
            parts.append(section("QEMU", end_of(control.parent / "qemu.log")))
            parts.append(section("console", end_of(control.parent / "console.log")))
        return "\n".join(parts)

    def _name(self) -> str:
        words = list(self.words)
        return words[words.index("--name") + 1] if "--name" in words else ""

    # --- its end ---

    async def ended(self, timeout: float = LIMIT) -> tuple[int, str]:
        """Wait for its end; return the exit status (negative: by that signal), and its messages."""
        await until(
            lambda: self.process.poll() is not None, "end of the process", _Shown(self), timeout=timeout
        )
        return self.process.wait(), self.errors

    async def killed(self) -> None:
        """Wait until it has killed itself."""
        status, errors = await self.ended()
        assert status == -signal.SIGKILL, errors

    async def stop(self) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            await self.ended()

    # --- the guest that it serves ---

    async def status(self, name: str) -> dict[str, Any]:
        """Return what ``vmbus status`` reports of a guest; empty while it is not served."""
        control = self.folder / "vmbus" / name / "control.sock"
        try:
            found: dict[str, Any] = await asyncio.to_thread(ask, control, "status")
        except UserError:
            return {}
        return found

    async def beats(self, name: str) -> int:
        """Return how many heartbeats the guest of that name has answered; 0 while it is not served."""
        channels = (await self.status(name)).get("channels", ())
        return next(
            (int(each["details"]["answers"]) for each in channels if each["device"] == "heartbeat"), 0
        )

    async def more_beats(self, name: str, *others: Side) -> None:
        """Wait for three more heartbeats; ends at once when this emulator, or one of ``others``, has ended."""
        wanted = await self.beats(name) + 3

        async def enough() -> bool:
            return await self.beats(name) >= wanted

        await until(enough, f"heartbeats of {name}", self, *others, timeout=LIMIT)


class _Shown:
    """A side that is shown, and whose end is what is waited for."""

    def __init__(self, side: Side) -> None:
        self._side = side

    def gone(self) -> str:
        return ""

    def report(self) -> str:
        return self._side.report()


async def asked(
    folder: Path,
    *words: str,
    status: int = 0,
    descriptors: Sequence[int] = (),
    logs: Path | None = None,
) -> str:
    """Run ``vmbus WORDS`` to its end; return its output, or its messages where ``status`` is not 0."""
    done = Emulator.start(folder, *words, descriptors=descriptors, logs=logs)
    found, errors = await done.ended()
    assert found == status, (
        f"`vmbus {' '.join(words)}`: status {found}, not {status}\n{errors}\n{done.output}"
    )
    return done.output if status == 0 else errors
