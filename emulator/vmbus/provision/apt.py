"""A private apt: packages of another Debian release, without touching the machine's own.

Lists, cache and configuration are in a folder of their own. Nothing is installed: packages are only fetched, with
apt's check of signatures, and unpacked. Partly downloaded files are kept and resumed by the next attempt. Root and
other users can use it.

    Archive("trixie", ...)   suites trixie, trixie-security, trixie-backports
      refresh()              the lists, if they are old
      closure(...)           packages and all that they depend on -> files
      exact(...)             just these versions -> files
      unpack(files, root)
"""

from __future__ import annotations

import os
import re
import subprocess
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote

from vmbus.errors import MissingRequirement, UserError
from vmbus.provision.cache import make_folder
from vmbus.provision.mirror import Mirror, describe
from vmbus.provision.progress import Progress

LISTS_MAX_AGE = 24 * 3600.0
"""Seconds after which the package lists are fetched again first."""


class DownloadError(UserError):
    """A download failed: the network, the archive, or its signature."""


@dataclass(frozen=True, slots=True)
class Version:
    """One version of a package that the archive offers, and the suite that has it ("trixie-backports/main")."""

    package: str
    version: str
    suite: str


class Archive:
    """The private apt of one Debian release. The lock of the cache must be held by the caller."""

    def __init__(
        self, folder: Path, codename: str, mirror: Mirror, progress: Progress, *, backports: bool = True
    ) -> None:
        """``backports``: use that suite too. An archive removes it when the release gets old."""
        self.codename = codename
        self.folder = folder
        self._mirror = mirror
        self._progress = progress
        self._backports = f"{codename}-backports"
        self._suites = (codename, self._backports) if backports else (codename,)

    def refresh(self, max_age: float = LISTS_MAX_AGE) -> None:
        """Fetch the package lists unless they are younger than ``max_age`` seconds."""
        self._configure()
        stamp = self.folder / "refreshed"
        if stamp.exists() and 0 <= time.time() - stamp.stat().st_mtime < max_age:
            return
        self._progress.step(f"package lists of Debian {self.codename}")
        self._apt_get("update", total=0)
        stamp.touch()

    def versions(self, package: str) -> list[Version]:
        """Return the versions of ``package`` that the archive offers, newest first."""
        output = self._query("apt-cache", "madison", package)
        found = []
        for line in output.splitlines():
            fields = [field.strip() for field in line.split("|")]
            if len(fields) == 3 and fields[2].endswith("Packages"):
                found.append(Version(fields[0], fields[1], fields[2].split()[1]))
        return found

    def field(self, package: Version, name: str) -> str:
        """Return a field of the package's record ("Depends"); "" if it has none."""
        output = self._query("apt-cache", "show", f"{package.package}={package.version}")
        match = re.search(rf"^{re.escape(name)}: (.*)$", output, re.MULTILINE)
        return match[1] if match else ""

    def closure(self, packages: Sequence[str], *, backports: bool) -> list[Path]:
        """Fetch ``packages`` and what they depend on, preferring backports if ``backports``; return the files."""
        release = ["-t", self._backports] if backports else []
        command = ["install", "--no-install-recommends", "--yes", *release, *packages]
        wanted = self._planned(command)
        archives = self.folder / "cache" / "archives"
        self._progress.step(f"loading {packages[0]} ({len(wanted)} packages)")
        self._apt_get(*command, "--download-only", total=sum(size for _, size in wanted))
        return self._check_there([archives / name for name, _ in wanted])

    def exact(self, packages: Sequence[Version]) -> list[Path]:
        """Fetch these versions without what they depend on; return the files."""
        command = ["download", *(f"{package.package}={package.version}" for package in packages)]
        wanted = self._planned(command)
        folder = make_folder(self.folder / "cache" / "single")
        self._progress.step(f"loading {packages[0].package}")
        self._apt_get(*command, total=sum(size for _, size in wanted), cwd=folder)
        return self._check_there([folder / name for name, _ in wanted])

    def unpack(self, files: Sequence[Path], root: Path) -> None:
        """Unpack packages into ``root`` without running anything in them."""
        self._progress.step(f"unpacking {len(files)} packages")
        for count, file in enumerate(files):
            try:
                subprocess.run(["dpkg-deb", "-x", file, root], check=True, capture_output=True, text=True)
            except FileNotFoundError:
                raise MissingRequirement(
                    "there is no dpkg-deb on this machine: install the package dpkg"
                ) from None
            except subprocess.CalledProcessError as error:
                file.unlink(missing_ok=True)
                raise DownloadError(
                    f"{file.name} cannot be unpacked ({error.stderr.strip()}); it was removed: run the command again"
                ) from error
            self._progress.advance(count + 1, len(files), "packages")
        self._progress.finish()

    def tidy(self) -> None:
        """Remove indexes that apt makes again in a second."""
        for index in (self.folder / "cache").glob("*pkgcache.bin*"):
            index.unlink(missing_ok=True)

    def forget(self, files: Sequence[Path]) -> None:
        """Remove fetched packages after they were unpacked."""
        for file in files:
            file.unlink(missing_ok=True)

    def _planned(self, command: Sequence[str]) -> list[tuple[str, int]]:
        """Return (file name, size in bytes) of everything that ``command`` needs."""
        # With an empty archives folder apt also names the packages that have been fetched already.
        empty = make_folder(self.folder / "cache" / "none" / "partial").parent
        output = self._query(
            "apt-get", "-o", f"Dir::Cache::archives={empty}", "--print-uris", *command, cwd=empty
        )
        found = []
        for line in output.splitlines():
            match = re.fullmatch(r"'[^']+' (\S+) (\d+)(?: \S+)?", line.strip())
            if match:
                # `install` prints the name that apt stores under, `download` the one that it writes.
                found.append((match[1], int(match[2])))
        return found

    def _check_there(self, files: list[Path]) -> list[Path]:
        there = []
        for file in files:
            # apt keeps the colon of an epoch as %3a in both commands; older ones do not in `download`
            candidates = [file, file.with_name(unquote(file.name))]
            existing = next((path for path in candidates if path.is_file()), None)
            if existing is None:
                raise DownloadError(f"apt-get did not fetch {file.name}: run the command again")
            there.append(existing)
        return there

    def _configure(self) -> None:
        for name in (
            "state",
            "state/lists/partial",
            "cache/archives/partial",
            "cache/single",
            "cache/none",
            "log",
        ):
            make_folder(self.folder / name)
        (self.folder / "status").touch()
        keyring = self._mirror.keyring
        if "BEGIN PGP" in keyring:
            (self.folder / "archive.asc").write_text(keyring)
            keyring = str(self.folder / "archive.asc")
        option = f"[signed-by={keyring}] " if keyring else ""
        entries = [f"deb {option}{self._mirror.main} {suite} main" for suite in self._suites]
        if self._mirror.security:
            entries.append(f"deb {option}{self._mirror.security} {self.codename}-security main")
        sources = "\n".join(entries) + "\n"
        path = self.folder / "sources.list"
        if not path.exists() or path.read_text() != sources:
            (self.folder / "refreshed").unlink(missing_ok=True)
        path.write_text(sources)
        (self.folder / "apt.conf").write_text("\n".join(self._settings()) + "\n")

    def _settings(self) -> list[str]:
        base = self.folder
        # The machine's own configuration (hooks, cleaning of downloads, pins) is left out, except for the settings
        # with which it reaches its archive.
        settings = {
            "Dir::State": base / "state",
            "Dir::State::status": base / "status",
            "Dir::Cache": base / "cache",
            "Dir::Log": base / "log",
            "Dir::Etc::main": "/dev/null",
            "Dir::Etc::parts": "/dev/null",
            "Dir::Etc::sourcelist": base / "sources.list",
            "Dir::Etc::sourceparts": "/dev/null",
            "Dir::Etc::preferences": "/dev/null",
            "Dir::Etc::preferencesparts": "/dev/null",
            "APT::Architecture": "amd64",
            "APT::Architectures": "amd64",
            "APT::Install-Recommends": "false",
            "APT::Sandbox::User": "root",  # else root's downloads run as _apt, who cannot write to the cache
            "APT::Keep-Downloaded-Packages": "true",
            "Acquire::Languages": "none",
            "Acquire::Retries": "3",
            "Acquire::GzipIndexes": "true",
        }
        return [f'{name} "{value}";' for name, value in settings.items()] + list(self._mirror.settings)

    def _environment(self) -> dict[str, str]:
        return {**os.environ, "APT_CONFIG": str(self.folder / "apt.conf"), "LC_ALL": "C.UTF-8"}

    def _query(self, *command: str, cwd: Path | None = None) -> str:
        try:
            return subprocess.run(
                command, env=self._environment(), cwd=cwd, capture_output=True, text=True, check=True
            ).stdout
        except FileNotFoundError:
            raise MissingRequirement(
                f"there is no {command[0]} on this machine: install the package apt"
            ) from None
        except subprocess.CalledProcessError as error:
            raise self._failure(command[-1], error.stderr) from error

    def _apt_get(self, *command: str, total: int, cwd: Path | None = None) -> None:
        read_end, write_end = os.pipe()
        try:
            process = subprocess.Popen(
                ["apt-get", "-qq", "-o", f"APT::Status-Fd={write_end}", *command],
                env=self._environment(),
                cwd=cwd,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
                pass_fds=(write_end,),
            )
        except FileNotFoundError:
            os.close(read_end)
            raise MissingRequirement("there is no apt-get on this machine: install the package apt") from None
        finally:
            os.close(write_end)
        reader = threading.Thread(target=self._follow, args=(read_end, total), daemon=True)
        reader.start()
        try:
            _, complaint = process.communicate()
        except BaseException:
            process.terminate()
            process.wait()
            raise
        finally:
            reader.join(timeout=5)
            self._progress.finish()
        # `update` exits with status 0 even if a suite could not be fetched; only the W: or E: lines tell
        if process.returncode != 0 or (command[0] == "update" and "Failed to fetch" in complaint):
            raise self._failure(command[0], complaint)

    def _follow(self, status: int, total: int) -> None:
        """Turn apt's status lines ("dlstatus:1:23.5:Retrieving ...") into progress."""
        with os.fdopen(status, errors="replace") as lines:
            for line in lines:
                fields = line.split(":", 3)
                try:
                    percent = float(fields[2])
                except (IndexError, ValueError):
                    continue
                if fields[0] == "dlstatus":
                    if total:
                        self._progress.advance(min(int(total * percent / 100), total), total, "B")
                    else:
                        self._progress.advance(int(percent), 100, "percent")

    def _failure(self, what: str, complaint: str) -> DownloadError:
        lines = [line[3:] for line in complaint.splitlines() if line.startswith(("E: ", "W: "))]
        reason = "; ".join(lines[:2])[:400] or complaint.strip()[-300:] or "apt-get gave no reason"
        if "NO_PUBKEY" in complaint or "GPG error" in complaint:
            advice = "the archive's key is not on this machine: install or upgrade debian-archive-keyring"
        elif re.search(r"  40[0-9]  ", complaint):
            advice = (
                f"{describe(self._mirror)} is not a complete Debian mirror: set VMBUS_DEBIAN_MIRROR to another one"
                if what == "update"
                else "the archive has changed since its lists were fetched: run the command again"
            )
        elif "No space left" in complaint:
            advice = "free some disk space, or point VMBUS_CACHE to another disk"
        elif "Could not get lock" in complaint:
            advice = "the apt-get of an interrupted setup is still running: run the command again in a moment"
        elif "Unable to locate" in complaint or "no installation candidate" in complaint:
            advice = f"the archive {describe(self._mirror)} has no such package; is it a full Debian mirror?"
        else:
            advice = "check the network and apt's proxy settings, then run the command again: downloads are resumed"
        (self.folder / "refreshed").unlink(
            missing_ok=True
        )  # lists that lag behind the archive give errors 404
        return DownloadError(f"apt-get {what} for Debian {self.codename} failed: {reason} ({advice})")
