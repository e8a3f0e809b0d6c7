"""The private apt: what is asked of the real one, and what its failures become."""

from __future__ import annotations

from pathlib import Path

import pytest
from vmbus.provision.apt import Archive, DownloadError, Version
from vmbus.provision.mirror import Mirror

from tests.unit.provision.fake_programs import only_programs

MIRROR = Mirror(
    "http://mirror.example/debian", "http://mirror.example/security", "/keys/a.gpg", ('X::Y "z";',)
)


class Recorder:
    """A progress that is remembered."""

    def __init__(self) -> None:
        self.steps: list[str] = []
        self.amounts: list[tuple[int, int, str]] = []

    def step(self, text: str) -> None:
        self.steps.append(text)

    def advance(self, done: int, total: int, unit: str) -> None:
        self.amounts.append((done, total, unit))

    def finish(self) -> None:
        pass


@pytest.fixture
def progress() -> Recorder:
    return Recorder()


@pytest.fixture
def archive(tmp_path: Path, progress: Recorder) -> Archive:
    return Archive(tmp_path / "apt", "trixie", MIRROR, progress)


def programs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, **scripts: str) -> None:
    only_programs(monkeypatch, tmp_path / "bin", **scripts)


def test_lists_are_fetched_once_a_day(
    archive: Archive, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    log = tmp_path / "log"
    programs(monkeypatch, tmp_path, apt_get=f'echo "$@" >>{log}')
    archive.refresh()
    archive.refresh()
    assert len(log.read_text().splitlines()) == 1
    archive.refresh(max_age=0)
    assert len(log.read_text().splitlines()) == 2


def test_sources_name_the_release_its_security_and_its_backports(
    archive: Archive, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    programs(monkeypatch, tmp_path, apt_get=":")
    archive.refresh()
    assert (archive.folder / "sources.list").read_text().splitlines() == [
        "deb [signed-by=/keys/a.gpg] http://mirror.example/debian trixie main",
        "deb [signed-by=/keys/a.gpg] http://mirror.example/debian trixie-backports main",
        "deb [signed-by=/keys/a.gpg] http://mirror.example/security trixie-security main",
    ]


def test_a_release_without_backports_is_asked_for_none(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, progress: Recorder
) -> None:
    programs(monkeypatch, tmp_path, apt_get=":")
    archive = Archive(tmp_path / "apt", "bullseye", MIRROR, progress, backports=False)
    archive.refresh()
    assert "backports" not in (archive.folder / "sources.list").read_text()


def test_the_configuration_is_private_and_never_allows_what_is_unsigned(
    archive: Archive, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    programs(monkeypatch, tmp_path, apt_get='cp "$APT_CONFIG" used')
    monkeypatch.chdir(tmp_path)
    archive.refresh()
    used = (tmp_path / "used").read_text()
    assert f'Dir::State "{archive.folder}/state";' in used
    assert 'Dir::Etc::parts "/dev/null";' in used
    assert 'X::Y "z";' in used
    assert "nsecure" not in used
    assert "Unauthenticated" not in used


def test_versions_are_told_with_their_suite(
    archive: Archive, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    lines = "\\n".join(
        [
            "linux | 7.3 | http://m.example/debian trixie-backports/main amd64 Packages",
            "linux | 6.12 | http://m.example/debian trixie/main amd64 Packages",
            "linux | 6.12 | http://m.example/debian trixie/main Sources",
        ]
    )
    programs(monkeypatch, tmp_path, apt_cache=f'printf "{lines}\\n"')
    assert archive.versions("linux") == [
        Version("linux", "7.3", "trixie-backports/main"),
        Version("linux", "6.12", "trixie/main"),
    ]


FETCHING = r"""
case "$*" in
*--print-uris*) printf "%s\n" "'http://m.example/a%2bb.deb' a+b_1%3a2_amd64.deb 3000 SHA256:00" \
                              "'http://m.example/c.deb' c_1_all.deb 1000 " ;;
*) for word in "$@"; do case "$word" in APT::Status-Fd=*) fd=${word#*=} ;; esac; done
   echo "dlstatus:1:25.0:Retrieving file 1 of 2" >/proc/self/fd/"$fd"
   echo "something else" >/proc/self/fd/"$fd"
   mkdir -p DIR && touch "DIR/a+b_1%3a2_amd64.deb" "DIR/c_1_all.deb" ;;
esac
"""


def test_exact_packages_are_fetched_with_progress_in_bytes(
    archive: Archive, progress: Recorder, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = archive.folder / "cache/single"
    programs(monkeypatch, tmp_path, apt_get=FETCHING.replace("DIR", str(folder)))
    files = archive.exact([Version("a+b", "1:2", "trixie/main")])
    assert [path.name for path in files] == ["a+b_1%3a2_amd64.deb", "c_1_all.deb"]
    assert (1000, 4000, "B") in progress.amounts


def test_a_package_with_all_it_needs_is_fetched_from_backports(
    archive: Archive, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = archive.folder / "cache/archives"
    script = f'echo "$@" >>{tmp_path}/log\n' + FETCHING.replace("DIR", str(folder))
    programs(monkeypatch, tmp_path, apt_get=script)
    assert len(archive.closure(["qemu"], backports=True)) == 2
    asked = (tmp_path / "log").read_text().splitlines()[-1]
    assert "install --no-install-recommends --yes -t trixie-backports qemu --download-only" in asked


def test_a_file_that_did_not_come_is_an_error(
    archive: Archive, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    programs(monkeypatch, tmp_path, apt_get=FETCHING.replace("DIR", str(tmp_path / "elsewhere")))
    with pytest.raises(DownloadError, match="did not fetch a"):
        archive.exact([Version("a+b", "1:2", "trixie/main")])


@pytest.mark.parametrize(
    ("complaint", "advice"),
    [
        ("E: Failed to fetch http://m.example  Could not connect", "check the network"),
        ("W: GPG error: http://m.example: NO_PUBKEY 0123", "debian-archive-keyring"),
        ("E: Failed to fetch http://m.example/InRelease  404  Not Found", "not a complete Debian mirror"),
        ("E: Could not get lock /x/lists/lock. It is held by process 7", "in a moment"),
        ("E: Write error - write (28: No space left on device)", "VMBUS_CACHE"),
        ("E: Unable to locate package qemu-system-x86", "full Debian mirror"),
    ],
)
def test_failures_say_what_to_do(
    archive: Archive, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, complaint: str, advice: str
) -> None:
    programs(monkeypatch, tmp_path, apt_get=f'echo "{complaint}" >&2; exit 100')
    with pytest.raises(DownloadError, match=advice) as error:
        archive.refresh()
    assert complaint[3:20] in str(error.value)
    assert not (archive.folder / "refreshed").exists()


def test_an_update_that_missed_a_suite_is_a_failure_although_apt_says_it_is_none(
    archive: Archive, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    programs(monkeypatch, tmp_path, apt_get='echo "W: Failed to fetch http://m.example/InRelease" >&2')
    with pytest.raises(DownloadError, match="InRelease"):
        archive.refresh()


def test_a_package_that_cannot_be_unpacked_is_removed_so_that_it_comes_again(
    archive: Archive, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    programs(monkeypatch, tmp_path, dpkg_deb='echo "unexpected end of file" >&2; exit 2')
    package = tmp_path / "a.deb"
    package.touch()
    with pytest.raises(DownloadError, match="unexpected end of file"):
        archive.unpack([package], tmp_path / "root")
    assert not package.exists()
