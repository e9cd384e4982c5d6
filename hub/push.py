"""From a folder here to a repository of the hub."""

import shlex
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

from hub.fetch import parse_hub_id, reason_of


def check_push(repository: str) -> None:
    """Check, before a run begins, that the hub knows the user who will push.

    Raises:
        ValueError: `repository` is not a hub id.
        PermissionError: nobody is logged in, or the hub does not know the token.
        ConnectionError: the hub cannot be reached.
    """
    hub_id = parse_hub_id(repository)
    if hub_id is None or hub_id.revision:
        raise ValueError(f"--push-to-hub must be an id like owner/name: got {repository!r}")
    try:
        HfApi().whoami()
    except (LocalTokenNotFoundError, HfHubHTTPError) as error:
        raise PermissionError(
            f"--push-to-hub must find a token that may write: {reason_of(error)}; log in with "
            "`hf auth login`"
        ) from None
    # a failed connection raises an error of whichever HTTP library the client uses
    except Exception as error:
        raise ConnectionError(f"--push-to-hub must reach the hub: {reason_of(error)}") from None


def push_folder(folder: Path, repository: str, message: str) -> str:
    """Upload a folder in one commit, and return the commit's address.

    If there is no such repository yet, a private one is made.

    Raises:
        ConnectionError: the hub refused the upload or could not be reached; the folder stays.
    """
    api = HfApi()
    try:
        api.create_repo(repository, private=True, exist_ok=True)
        commit = api.upload_folder(repo_id=repository, folder_path=folder, commit_message=message)
    except Exception as error:
        raise ConnectionError(
            f"{repository} could not be pushed to: {reason_of(error)}; the files are in {folder}: "
            f"`hf upload {repository} {shlex.quote(str(folder))} . --private` sends them"
        ) from None
    return commit.commit_url
