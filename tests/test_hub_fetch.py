"""hub/fetch.py with the real client, against a hub on 127.0.0.1."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT
from support.hub_server import TOKEN, Hub, Repository, files_of, serving

from hub.fetch import HubId, find_folder, parse_hub_id, snapshot_id

# the choice is the smallest that reads a file first, as that of a checkpoint does
FETCH = """
import sys
from hub.fetch import find_folder

def choose(names, get):
    return get("list.txt").read_text().split() if "list.txt" in names else names

try:
    print(find_folder(sys.argv[1], "--model", sys.argv[2], choose))
except (OSError, ValueError) as error:
    print(f"{type(error).__name__}: {error}")
"""


def fetch(hub: Hub, home: Path, place: str, kind: str = "model", **environment: str) -> str:
    done = hub.run(["-c", FETCH, place, kind], home, **environment)
    assert done.returncode == 0, done.stderr
    assert TOKEN not in done.stdout + done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("owner/name", HubId("owner/name")),
        ("TinyLlama/TinyLlama-1.1B-Chat-v1.0", HubId("TinyLlama/TinyLlama-1.1B-Chat-v1.0")),
        ("owner/name@main", HubId("owner/name", "main")),
        ("owner/name@refs/pr/1", HubId("owner/name", "refs/pr/1")),
        ("name", None),
        ("a/b/c", None),
        ("./a/b", None),
        ("../b", None),
        ("a/..", None),
        ("a/b@../c", None),
        ("owner/name@", None),
        ("owner/na me", None),
        ("", None),
    ],
)
def test_an_id_is_told_from_a_path(text: str, expected: HubId | None) -> None:
    assert parse_hub_id(text) == expected
    if expected:
        assert str(expected) == text


@pytest.mark.parametrize(
    ("place", "expected"),
    [
        ("hub/models--owner--a-b.c/snapshots/0123abcd", HubId("owner/a-b.c", "0123abcd")),
        ("models--owner--a/snapshots/0123abcd/", HubId("owner/a", "0123abcd")),
        ("hub/datasets--owner--a/snapshots/0123abcd", None),
        ("hub/models--gpt2/snapshots/0123abcd", None),
        ("hub/models--owner--a/blobs/0123abcd", None),
        ("hub/models--owner--a b/snapshots/0123abcd", None),
        ("models--owner--a", None),
        ("/", None),
    ],
)
def test_a_folder_of_the_hubs_cache_says_whose_commit_it_is(
    tmp_path: Path, place: str, expected: HubId | None
) -> None:
    assert snapshot_id(tmp_path / place) == expected


def test_only_needed_files_are_fetched_once_and_found_again_offline(tmp_path: Path) -> None:
    files = {"list.txt": b"a.txt b/c.txt", "a.txt": b"1", "b/c.txt": b"2", "large.bin": b"3"}
    with serving(models__owner__name=Repository(files)) as hub:
        folder = Path(fetch(hub, tmp_path, "owner/name"))
        assert sorted(hub.downloads()) == ["a.txt", "b/c.txt", "list.txt"]
        assert files_of(folder).keys() == {"a.txt", "b/c.txt", "list.txt"}
        assert fetch(hub, tmp_path, "owner/name") == str(folder)
        # nothing is sent twice
        assert len(hub.downloads()) == 3
        num_requests = len(hub.requests)
        assert fetch(hub, tmp_path, "owner/name", HF_HUB_OFFLINE="1") == str(folder)
        assert len(hub.requests) == num_requests
    # the server is gone
    assert fetch(hub, tmp_path, "owner/name") == str(folder)
    (folder / "a.txt").unlink()
    for environment in ({}, {"HF_HUB_OFFLINE": "1"}):
        said = fetch(hub, tmp_path, "owner/name", **environment)
        assert said.startswith("ConnectionError: --model must be fetched or in the hub's cache: ")
        assert "the cache does not have a.txt of it: owner/name; run again with a conn" in said


def test_a_revision_is_fetched_and_an_unknown_one_is_refused(tmp_path: Path) -> None:
    repository = Repository({"a.txt": b"old"}, branches=("v1",))
    with serving(models__owner__name=repository) as hub:
        folder = Path(fetch(hub, tmp_path, "owner/name@v1"))
        assert (folder / "a.txt").read_bytes() == b"old"
        assert fetch(hub, tmp_path, f"owner/name@{repository.sha}") == str(folder)
        said = fetch(hub, tmp_path, "owner/name@v2")
        assert said.startswith("FileNotFoundError: --model: owner/name must have the revision 'v2'")


def test_a_broken_connection_goes_on_where_it_stopped(tmp_path: Path) -> None:
    # the client writes pieces of 10 MiB
    content = bytes(range(256)) * (21 << 12)
    repository = Repository({"a.bin": content}, cuts={"a.bin": [11 << 20, 5]})
    with serving(models__owner__name=repository) as hub:
        folder = Path(fetch(hub, tmp_path, "owner/name"))
        assert (folder / "a.bin").read_bytes() == content
        sent = [r.range for r in hub.requests if r.method == "GET" and r.path.endswith("a.bin")]
        assert sent == [None, f"bytes={10 << 20}-", f"bytes={10 << 20}-"]


def test_a_killed_download_keeps_what_was_whole(tmp_path: Path) -> None:
    files = {"a.txt": b"1", "b.bin": bytes(1 << 20)}
    # connections that break again and again keep the client busy
    repository = Repository(files, cuts={"b.bin": [9] * 100})
    with serving(models__owner__name=repository) as hub:
        process = subprocess.Popen(
            [sys.executable, "-c", FETCH, "owner/name", "model"],
            cwd=ROOT,
            env=hub.environment(tmp_path),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        deadline = time.monotonic() + 60
        while sorted(set(hub.downloads())) != ["a.txt", "b.bin"]:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        # the small file needs a moment from the wire to its place
        while not list(tmp_path.glob("hub/models--*/snapshots/*/a.txt")):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.wait()
        repository.cuts.clear()
        hub.requests.clear()
        folder = Path(fetch(hub, tmp_path, "owner/name"))
        assert hub.downloads() == ["b.bin"]
        assert files_of(folder) == files


def test_the_usual_token_is_used_and_never_printed(tmp_path: Path) -> None:
    repository = Repository({"a.txt": b"1"}, needs_token=True)
    with serving(datasets__owner__name=repository) as hub:
        said = fetch(hub, tmp_path / "none", "owner/name", "dataset")
        assert "the hub has no dataset of that name that you may see" in said
        assert "hf auth login" in said
        found = fetch(hub, tmp_path / "variable", "owner/name", "dataset", HF_TOKEN=TOKEN)
        assert Path(found, "a.txt").is_file()
        home = tmp_path / "file"
        home.mkdir()
        (home / "token").write_text(TOKEN)
        assert Path(fetch(hub, home, "owner/name", "dataset"), "a.txt").is_file()


def test_gated_and_absent_repositories_are_refused_by_name(tmp_path: Path) -> None:
    with serving(models__owner__gated=Repository({}, is_gated=True)) as hub:
        said = fetch(hub, tmp_path, "owner/gated", HF_TOKEN=TOKEN)
        assert said == (
            f"PermissionError: --model: owner/gated is gated: accept its terms at {hub.url}/owner/"
            "gated, and log in with `hf auth login`"
        )
        said = fetch(hub, tmp_path, "owner/none")
        assert said.startswith(
            "FileNotFoundError: --model must be a folder or a hub id: owner/none"
        )
    said = fetch(hub, tmp_path, "owner/other")
    assert said.startswith("ConnectionError: --model must be fetched or in the hub's cache: http:")


def test_a_folder_that_is_not_there_is_answered_with_the_nearest(tmp_path: Path) -> None:
    (tmp_path / "smollm2").mkdir()
    (tmp_path / "other").mkdir()
    with pytest.raises(FileNotFoundError, match=r"got '.*/smolm2'; did you mean smollm2\?$"):
        find_folder(f"{tmp_path}/smolm2", "--model", "model", lambda names, get: ())
    with pytest.raises(FileNotFoundError, match=r"got '.*/none/smollm2'$"):
        find_folder(f"{tmp_path}/none/smollm2", "--model", "model", lambda names, get: ())
