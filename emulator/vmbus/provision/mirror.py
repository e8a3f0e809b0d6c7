"""The Debian archive that this machine uses, read from its own apt configuration.

This program contains no address of an archive. ``$VMBUS_DEBIAN_MIRROR`` names one for machines whose apt has none
(another distribution): a base address as in ``sources.list``, with the security archive after a blank.

Both forms of apt's sources are read (``sources.list(5)``): one-line entries in ``*.list`` and deb822 stanzas
in ``*.sources``.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from vmbus.errors import MissingRequirement

_DEBIAN_SUITE = re.compile(
    r"(?P<name>bullseye|bookworm|trixie|forky|sid|oldoldstable|oldstable|stable|testing|unstable)"
    r"(?P<kind>-security|/updates|-updates|-backports|-proposed-updates)?"
)
_SYSTEM_KEYRINGS = ("debian-archive-keyring.pgp", "debian-archive-keyring.gpg")
_WITHOUT_APT = (
    "there is no apt-get on this machine, so vmbus cannot fetch QEMU and guest kernels by itself: install QEMU 11.1 "
    "or newer with TCG plug-ins (or name it in VMBUS_QEMU) and give a kernel with --kernel and --modules"
)


@dataclass(frozen=True, slots=True)
class Source:
    """One entry of apt's sources: an address, one suite, its components and its keyring ("" = apt's own)."""

    uri: str
    suite: str
    components: tuple[str, ...] = ()
    signed_by: str = ""


@dataclass(frozen=True, slots=True)
class Mirror:
    """A Debian archive: base addresses, and the keyring that signs it.

    ``keyring`` is a path, or a key in ASCII armour (deb822 allows it in place), or "" for apt's trusted keys.
    """

    main: str
    security: str
    keyring: str
    settings: tuple[str, ...] = ()
    """Lines for apt.conf: the machine's own proxies, certificates, retries."""


def parse_list(text: str) -> list[Source]:
    """Return the binary entries of a one-line-style file; lines that do not parse are left to apt to report."""
    found = []
    for line in text.splitlines():
        match = re.match(
            r"deb\s+(?:\[(?P<options>[^]]*)\]\s+)?(?P<rest>[^#\s].*)", line.split("#", 1)[0].strip()
        )
        if match is None:
            continue
        words = match["rest"].split()
        if len(words) < 2:
            continue
        options = dict(option.split("=", 1) for option in (match["options"] or "").split() if "=" in option)
        found.append(Source(words[0], words[1], tuple(words[2:]), options.get("signed-by", "")))
    return found


def parse_deb822(text: str) -> list[Source]:
    """Return the enabled binary entries of a deb822-style file."""
    found = []
    for stanza in re.split(r"\n[ \t]*\n", "\n".join(x for x in text.splitlines() if not x.startswith("#"))):
        fields: dict[str, str] = {}
        name = ""
        for line in stanza.splitlines():
            if line[:1] in (" ", "\t"):
                fields[name] = f"{fields.get(name, '')}\n{line.strip()}"
            elif ":" in line:
                name, _, value = line.partition(":")
                name = name.strip().lower()
                fields[name] = value.strip()
        if "deb" not in fields.get("types", "").split() or fields.get("enabled", "yes").lower() in (
            "no",
            "false",
        ):
            continue
        key = fields.get("signed-by", "").strip()
        if "BEGIN PGP" in key:  # in deb822 a line with only a full stop stands for an empty one
            key = "\n".join("" if line == "." else line for line in key.splitlines()) + "\n"
        components = tuple(fields.get("components", "").split())
        found += [
            Source(uri, suite, components, key)
            for uri in fields.get("uris", "").split()
            for suite in fields.get("suites", "").split()
        ]
    return found


def choose_mirror(sources: Iterable[Source]) -> tuple[str, str, str] | None:
    """Return (main address, security address or "", keyring) of the Debian archive among ``sources``, else None.

    A third party's archive may use Debian's suite names too; one that Debian's keys sign is preferred.
    """
    ranked: list[tuple[int, bool, Source]] = []
    for source in sources:
        match = _DEBIAN_SUITE.fullmatch(source.suite)
        if match is None or "main" not in source.components or source.uri.startswith("cdrom:"):
            continue
        by_debian = Path(source.signed_by.split(",")[0]).name.startswith("debian-archive")
        looks_like = re.search(r"/debian(-security)?/?$", source.uri) is not None
        security = match["kind"] in ("-security", "/updates")
        ranked.append((-(2 * by_debian + looks_like), security, source))
    ranked.sort(key=lambda item: item[0])
    main = next((source for _, security, source in ranked if not security), None)
    if main is None:
        return None
    fixes = next((source.uri for _, security, source in ranked if security), "")
    return main.uri, fixes, main.signed_by


def find_mirror(environ: Mapping[str, str] = os.environ) -> Mirror:
    """Return the Debian archive that this machine uses. Raises :class:`MissingRequirement` if there is none."""
    configuration = apt_configuration()
    settings = tuple(_carried_over(configuration))
    if chosen := environ.get("VMBUS_DEBIAN_MIRROR", "").split():
        return Mirror(chosen[0], chosen[1] if len(chosen) > 1 else "", _system_keyring(""), settings)
    found = choose_mirror(machine_sources(configuration))
    if found is None:
        raise MissingRequirement(
            "apt on this machine has no Debian archive from which to fetch QEMU and guest kernels: set "
            "VMBUS_DEBIAN_MIRROR to the address of one (and install debian-archive-keyring), or install QEMU 11.1 "
            "or newer and give a kernel with --kernel and --modules"
        )
    main, security, keyring = found
    return Mirror(main, security, _system_keyring(keyring), settings)


def apt_configuration() -> list[tuple[str, str]]:
    """Return ``apt-config dump`` as (name, value) pairs. Raises :class:`MissingRequirement` without apt."""
    try:
        dump = subprocess.run(["apt-config", "dump"], capture_output=True, text=True, check=True).stdout
    except FileNotFoundError:
        raise MissingRequirement(_WITHOUT_APT) from None
    except subprocess.CalledProcessError as error:
        raise MissingRequirement(
            f"apt-config dump failed: {error.stderr.strip()}; repair apt's configuration, then run the command again"
        ) from error
    pairs = []
    for line in dump.splitlines():
        match = re.fullmatch(r'(\S+) "(.*)";', line)
        if match:
            pairs.append((match[1], match[2]))
    return pairs


def machine_sources(configuration: Sequence[tuple[str, str]]) -> list[Source]:
    """Return all sources that the machine's apt reads."""
    values = dict(configuration)
    etc = Path(values.get("Dir", "/")) / values.get("Dir::Etc", "etc/apt")
    parts = etc / values.get("Dir::Etc::sourceparts", "sources.list.d")
    files = [etc / values.get("Dir::Etc::sourcelist", "sources.list")]
    if parts.is_dir():
        files += sorted(path for path in parts.iterdir() if path.suffix in (".list", ".sources"))
    found = []
    for path in files:
        try:
            text = path.read_text(errors="replace")
        except OSError:
            continue  # as apt does: a missing file has no entries
        found += parse_deb822(text) if path.suffix == ".sources" else parse_list(text)
    return found


def _carried_over(configuration: Iterable[tuple[str, str]]) -> Iterable[str]:
    """Yield the settings with which the machine reaches its archive; none weakens the check of signatures."""
    wanted = re.compile(
        r"Acquire::(http|https|ftp|Retries|ForceIPv[46]|Check-Valid-Until|Check-Date|Max-ValidTime|Queue-Mode)(::.*)?"
    )
    for name, value in configuration:
        if value and wanted.fullmatch(name):
            yield f'{name} "{value}";'


def _system_keyring(signed_by: str) -> str:
    if signed_by:
        return signed_by
    for name in _SYSTEM_KEYRINGS:
        if (path := Path("/usr/share/keyrings") / name).exists():
            return str(path)
    return ""


def describe(mirror: Mirror) -> str:
    """Return the address or addresses, for messages."""
    return shlex.join([mirror.main, mirror.security] if mirror.security else [mirror.main])
