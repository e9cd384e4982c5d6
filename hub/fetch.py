"""From a path or a hub id to a local folder with the files that are needed.

    meta-llama/Llama-3.2-1B              the newest commit of the default branch
    meta-llama/Llama-3.2-1B@v1.0         a branch, a tag or a commit

The list of files in a commit decides which of them are needed; only these are fetched, into the
hub's cache. A download goes on where it stopped when the connection broke; after a killed process,
its complete files stay. Without a connection, or with HF_HUB_OFFLINE=1, the cache must have all
needed files. The token comes from `hf auth login` or HF_TOKEN, and no message shows it.
"""

import glob
import os
import re
from collections.abc import Callable, Collection, Iterable
from difflib import get_close_matches
from pathlib import Path
from typing import Literal, NamedTuple, NoReturn

from huggingface_hub import HfApi, constants, hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from foreign.terminal import first_line

Kind = Literal["model", "dataset"]
# chooses the needed files from the names in a repository, with a function that fetches one of them
Choose = Callable[[Collection[str], Callable[[str], Path]], Iterable[str]]

# a repository's folder in the hub's cache; neither part of an id may have two hyphens in a row
_CACHED = re.compile(r"models--(.+?)--(.+)")
_ID = re.compile(r"([\w-][\w.-]*/[\w.-]+)(?:@([\w./-]+))?")


class HubId(NamedTuple):
    """A repository and its branch, tag or commit; None is the default branch."""

    repository: str
    revision: str | None = None

    def __str__(self) -> str:
        return self.repository + (f"@{self.revision}" if self.revision else "")


def parse_hub_id(text: str) -> HubId | None:
    """Read `owner/name` or `owner/name@revision`; None if the text is neither."""
    found = _ID.fullmatch(text)
    return None if found is None or ".." in text else HubId(*found.groups())


def snapshot_id(folder: Path) -> HubId | None:
    """The hub id of a model whose commit is in this folder of the hub's cache; None for any other
    folder."""
    folder = folder.resolve()
    found = _CACHED.fullmatch(folder.parent.parent.name)
    if found is None or folder.parent.name != "snapshots":
        return None
    return parse_hub_id(f"{found[1]}/{found[2]}@{folder.name}")


def _nearest(folder: Path) -> str:
    """Ask for the folders beside one that is not there, whose names are like its."""
    beside = folder.parent.iterdir() if folder.parent.is_dir() else ()
    nearest = get_close_matches(folder.name, [path.name for path in beside if path.is_dir()])
    return f"; did you mean {' or '.join(nearest)}?" if nearest else ""


def find_folder(place: str, what: str, kind: Kind, choose: Choose) -> Path:
    """Find a local folder, or fetch the needed files of a repository.

    Args:
        place: a path or a hub id.
        what: the flag that names the place, such as "--model", for messages.
        choose: chooses the files; it raises a ValueError if the repository lacks what is needed.

    Raises:
        FileNotFoundError: there is no such folder and no such repository or revision.
        PermissionError: the repository's terms are not accepted.
        ConnectionError: the hub cannot be reached, and the cache lacks a needed file.
        ValueError: raised by `choose`.
    """
    folder = Path(os.path.expanduser(place))
    if place and folder.is_dir():
        return folder
    hub_id = None if folder.exists() or place.startswith((".", "/", "~")) else parse_hub_id(place)
    if hub_id is None:
        raise FileNotFoundError(
            f"{what} must be a folder or a hub id like owner/name or owner/name@revision: "
            f"got {place!r}{_nearest(folder)}"
        )
    try:
        ask = HfApi().model_info if kind == "model" else HfApi().dataset_info
        info = ask(hub_id.repository, revision=hub_id.revision)
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        _refuse(what, kind, hub_id, error)
    # a failed connection raises an error of whichever HTTP library the client uses
    except Exception as error:
        return _from_cache(what, kind, hub_id, choose, error)

    def get(name: str) -> Path:
        return Path(hf_hub_download(hub_id.repository, name, repo_type=kind, revision=info.sha))

    names = {sibling.rfilename for sibling in info.siblings or ()}
    try:
        needed = sorted(choose(names, get))
        return Path(
            snapshot_download(
                hub_id.repository,
                repo_type=kind,
                # the revision's name, not its commit: without a connection the cache needs the name
                revision=hub_id.revision,
                allow_patterns=[glob.escape(name) for name in needed],
            )
        )
    except LocalEntryNotFoundError as error:
        raise _unreachable(what, hub_id, error) from None
    except (HfHubHTTPError, EntryNotFoundError) as error:
        _refuse(what, kind, hub_id, error)


def _from_cache(what: str, kind: Kind, hub_id: HubId, choose: Choose, reason: Exception) -> Path:
    """Find an earlier download, which must have all needed files."""
    try:
        folder = Path(
            snapshot_download(
                hub_id.repository,
                repo_type=kind,
                revision=hub_id.revision,
                allow_patterns=[],
                local_files_only=True,
            )
        )
    except (LocalEntryNotFoundError, OSError, ValueError):
        raise _unreachable(what, hub_id, reason) from None
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    missing = sorted(set(choose(names, folder.joinpath)) - names)
    if missing:
        raise _unreachable(what, hub_id, reason, f"{', '.join(missing[:3])} of it")
    return folder


def _unreachable(
    what: str, hub_id: HubId, reason: Exception, missing: str = "it"
) -> ConnectionError:
    why = (
        "HF_HUB_OFFLINE is set"
        if isinstance(reason, OfflineModeIsEnabled)
        else f"{constants.ENDPOINT} cannot be reached ({reason_of(reason)})"
    )
    return ConnectionError(
        f"{what} must be fetched or in the hub's cache: {why}, and the cache does not have "
        f"{missing}: {hub_id}; run again with a connection, complete files are kept"
    )


def _refuse(what: str, kind: Kind, hub_id: HubId, error: Exception) -> NoReturn:
    """Raise an error that explains the hub's answer."""
    page = "/".join(
        [constants.ENDPOINT, *(["datasets"] if kind == "dataset" else []), hub_id.repository]
    )
    if isinstance(error, GatedRepoError):
        raise PermissionError(
            f"{what}: {hub_id} is gated: accept its terms at {page}, and log in with "
            "`hf auth login`"
        ) from None
    if isinstance(error, RevisionNotFoundError):
        raise FileNotFoundError(
            f"{what}: {hub_id.repository} must have the revision {hub_id.revision!r}: the hub has "
            f"none of that name; see {page}/commits/main"
        ) from None
    if isinstance(error, RepositoryNotFoundError):
        raise FileNotFoundError(
            f"{what} must be a folder or a hub id: {hub_id} is no folder here, and the hub has no "
            f"{kind} of that name that you may see; if it is private, log in with `hf auth login`"
        ) from None
    raise ConnectionError(f"{what}: {hub_id} could not be fetched: {reason_of(error)}") from None


def reason_of(error: Exception) -> str:
    """The first line of an error's message: further lines quote the request and its headers."""
    return first_line(error) or repr(error)
