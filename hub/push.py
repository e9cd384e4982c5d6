"""From a folder here to a repository of the hub."""

import shlex
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

from hub.fetch import first_line, parse_hub_id


def check_push(repository: str) -> None:
    """See, before anything else is done, that there is somebody to push as.

    Raises:
        ValueError: the id is none.
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
            f"--push-to-hub must find a token that may write: {first_line(error)}; log in with "
            "`hf auth login`"
        ) from None
    # what a connection that fails raises depends on the client's HTTP library
    except Exception as error:
        raise ConnectionError(f"--push-to-hub must reach the hub: {first_line(error)}") from None


def push_folder(folder: Path, repository: str, message: str) -> str:
    """Upload all of a folder in one commit, and return the commit's address.

    A repository that is not there yet is made, private.

    Raises:
        ConnectionError: the hub refused it or could not be reached; the folder is as it was.
    """
    api = HfApi()
    try:
        api.create_repo(repository, private=True, exist_ok=True)
        commit = api.upload_folder(repo_id=repository, folder_path=folder, commit_message=message)
    except Exception as error:
        raise ConnectionError(
            f"{repository} could not be pushed to: {first_line(error)}; the files are in {folder}: "
            f"`hf upload {repository} {shlex.quote(str(folder))} . --private` sends them"
        ) from None
    return commit.commit_url
