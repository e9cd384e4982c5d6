"""hub/push.py with the real client, against a hub on 127.0.0.1."""

from pathlib import Path

from support.hub_server import TOKEN, Repository, serving

PUSH = """
import sys
from pathlib import Path
from hub.push import check_push, push_folder

try:
    if sys.argv[3:] != ["unchecked"]:
        check_push(sys.argv[1])
    print(push_folder(Path(sys.argv[2]), sys.argv[1], "An adapter"))
except (OSError, ValueError) as error:
    print(f"{type(error).__name__}: {error}")
"""


def test_a_folder_is_pushed_to_a_private_repository(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    (folder / "more").mkdir(parents=True)
    for name in ("a.json", "more/b [1].txt"):
        (folder / name).write_text(name)
    with serving() as hub:
        for _ in range(2):
            done = hub.run(["-c", PUSH, "owner/name", str(folder)], tmp_path, HF_TOKEN=TOKEN)
            repository = hub.repositories["models/owner/name"]
            url = f"{hub.url}/owner/name/commit/{repository.sha}"
            assert done.stdout.strip() == url, done.stderr
            assert TOKEN not in done.stdout + done.stderr
        assert repository.files == {"a.json": b"a.json", "more/b [1].txt": b"more/b [1].txt"}
        assert hub.messages == ["An adapter"] * 2
        # as clients before 1.0 ask, and those after it
        assert all(
            asked.get("private") or asked["visibility"] == "private" for asked in hub.created
        )


def test_without_a_token_nothing_is_sent(tmp_path: Path) -> None:
    with serving(models__owner__name=Repository({})) as hub:
        done = hub.run(["-c", PUSH, "owner/name", str(tmp_path)], tmp_path)
        assert done.stdout.startswith("PermissionError: --push-to-hub must find a token that may")
        done = hub.run(["-c", PUSH, "owner/name", str(tmp_path)], tmp_path, HF_TOKEN="hf_wrong")
        assert done.stdout.startswith("PermissionError: --push-to-hub must find a token that may")
        assert "hf_wrong" not in done.stdout + done.stderr
        assert not [request for request in hub.requests if request.method == "POST"]
    done = hub.run(["-c", PUSH, "owner/name", str(tmp_path)], tmp_path, HF_TOKEN=TOKEN)
    assert done.stdout.startswith("ConnectionError: --push-to-hub must reach the hub")


def test_what_is_no_id_is_refused(tmp_path: Path) -> None:
    with serving() as hub:
        for text in ("name", "owner/name@main"):
            done = hub.run(["-c", PUSH, text, str(tmp_path)], tmp_path, HF_TOKEN=TOKEN)
            assert done.stdout.startswith("ValueError: --push-to-hub must be an id like owner/name")
        assert not hub.requests


def test_a_refused_push_says_how_to_send_the_folder_as_privately(tmp_path: Path) -> None:
    folder = tmp_path / "my out" / "hub"
    folder.mkdir(parents=True)
    with serving() as hub:
        given = ["-c", PUSH, "owner/name", str(folder), "unchecked"]
        done = hub.run(given, tmp_path, HF_TOKEN="hf_wrong")
    assert done.stdout.startswith("ConnectionError: owner/name could not be pushed to: ")
    assert (
        f"the files are in {folder}: `hf upload owner/name '{folder}' . --private`" in done.stdout
    )
    assert "hf_wrong" not in done.stdout + done.stderr
