"""The archive's address comes from the machine's own apt configuration."""

from __future__ import annotations

from pathlib import Path

import pytest
from vmbus.errors import MissingRequirement
from vmbus.provision import mirror
from vmbus.provision.mirror import (
    Source,
    choose_mirror,
    find_mirror,
    machine_sources,
    parse_deb822,
    parse_list,
)

KEYRING = "/usr/share/keyrings/debian-archive-keyring.gpg"


def test_one_line_entries_are_read() -> None:
    text = f"""
    # a remark
    deb http://mirror.example/debian bookworm main contrib  # another
    deb [arch=amd64 signed-by={KEYRING}] http://mirror.example/debian trixie main
    deb-src http://mirror.example/debian bookworm main
    deb broken
    """
    assert parse_list(text) == [
        Source("http://mirror.example/debian", "bookworm", ("main", "contrib")),
        Source("http://mirror.example/debian", "trixie", ("main",), KEYRING),
    ]


def test_deb822_stanzas_are_read() -> None:
    text = f"""\
Types: deb deb-src
# a remark
URIs: http://mirror.example/debian
Suites: bookworm bookworm-updates
Components: main
Signed-By: {KEYRING}

Types: deb
URIs: http://mirror.example/off
Suites: bookworm
Enabled: no

Types: deb-src
URIs: http://mirror.example/source
Suites: bookworm
"""
    assert parse_deb822(text) == [
        Source("http://mirror.example/debian", "bookworm", ("main",), KEYRING),
        Source("http://mirror.example/debian", "bookworm-updates", ("main",), KEYRING),
    ]


def test_a_key_in_place_is_kept_whole() -> None:
    text = """\
Types: deb
URIs: http://mirror.example/debian
Suites: trixie
Components: main
Signed-By:
 -----BEGIN PGP PUBLIC KEY BLOCK-----
 .
 mDMEabc
 -----END PGP PUBLIC KEY BLOCK-----
"""
    (source,) = parse_deb822(text)
    assert source.signed_by.splitlines()[:3] == ["-----BEGIN PGP PUBLIC KEY BLOCK-----", "", "mDMEabc"]


def test_the_security_archive_is_told_from_the_main_one() -> None:
    sources = [
        Source("http://mirror.example/debian-security", "bookworm-security", ("main",), KEYRING),
        Source("http://mirror.example/debian", "bookworm", ("main",), KEYRING),
    ]
    assert choose_mirror(sources) == (
        "http://mirror.example/debian",
        "http://mirror.example/debian-security",
        KEYRING,
    )


def test_a_third_party_with_debian_s_suite_names_is_not_taken() -> None:
    sources = [
        Source("https://vendor.example/apt", "bookworm", ("main",), "/etc/apt/keyrings/vendor.gpg"),
        Source("https://tools.example/linux/debian", "bookworm", ("stable",)),
        Source("http://mirror.example/debian", "bookworm", ("main",)),
    ]
    chosen = choose_mirror(sources)
    assert chosen is not None
    assert chosen[0] == "http://mirror.example/debian"


def test_a_machine_of_another_distribution_has_none() -> None:
    assert choose_mirror([Source("http://mirror.example/ubuntu", "noble", ("main",))]) is None


def test_files_of_both_kinds_are_read_from_where_apt_has_them(tmp_path: Path) -> None:
    parts = tmp_path / "etc/apt/sources.list.d"
    parts.mkdir(parents=True)
    (tmp_path / "etc/apt/sources.list").write_text("deb http://a.example/debian trixie main\n")
    (parts / "b.sources").write_text(
        "Types: deb\nURIs: http://b.example/debian\nSuites: trixie\nComponents: main\n"
    )
    (parts / "c.list.disabled").write_text("deb http://c.example/debian trixie main\n")
    found = machine_sources([("Dir", str(tmp_path)), ("Dir::Etc", "etc/apt")])
    assert [source.uri for source in found] == ["http://a.example/debian", "http://b.example/debian"]


def test_the_way_to_the_network_is_carried_over_and_nothing_weaker(monkeypatch: pytest.MonkeyPatch) -> None:
    configuration = [
        ("Acquire::http::Proxy", "http://proxy.example:3128"),
        ("Acquire::AllowInsecureRepositories", "1"),
        ("APT::Get::AllowUnauthenticated", "1"),
        ("Acquire::http", ""),
        ("DPkg::Post-Invoke::", "rm -f everything"),
    ]
    monkeypatch.setattr(mirror, "apt_configuration", lambda: configuration)
    found = find_mirror({"VMBUS_DEBIAN_MIRROR": "http://m.example/debian http://s.example/debian-security"})
    assert (found.main, found.security) == ("http://m.example/debian", "http://s.example/debian-security")
    assert found.settings == ('Acquire::http::Proxy "http://proxy.example:3128";',)


def test_without_an_archive_the_error_names_the_way_out(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(mirror, "apt_configuration", lambda: [("Dir", str(tmp_path))])
    with pytest.raises(MissingRequirement, match="VMBUS_DEBIAN_MIRROR"):
        find_mirror({})


def test_without_apt_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(MissingRequirement, match=r"install QEMU 11\.1"):
        find_mirror({})
