"""Sending files to the Hugging Face hub, or to whatever answers as it does (`HF_ENDPOINT`)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from grun.errors import ConfigError, HubError
from grun.runtime.reading import in_one_line


def push(
    files: Mapping[str, bytes],
    repo_id: str,
    *,
    commit_message: str,
    private: bool | None = None,
    token: str | None = None,
    revision: str | None = None,
) -> str:
    """Send files to a model repository of the hub in one commit; its URL.

    Args:
        files: content by path in the repository; what else is there stays.
        repo_id: OWNER/NAME, or NAME of the token's own; made if it is not there.
        commit_message: what the commit says.
        private: of a new repository; None: as its owner's are by default.
        token: None: the one of `HF_TOKEN`, or of `hf auth login`.
        revision: branch, made if it is not there; None: main.

    Raises:
        ConfigError: the name cannot be a repository's, or there is no token.
        HubError: the hub refuses, or cannot be reached.
    """
    from huggingface_hub import CommitOperationAdd, HfApi, get_token

    check_name(repo_id)
    if (token := token or get_token()) is None:
        raise ConfigError(
            f"no token for the hub, so nothing is sent to {repo_id}: run `hf auth login`, or set HF_TOKEN to one "
            "that may write"
        )
    api = HfApi(token=token)
    with _one_line(repo_id, api.endpoint):
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None and not revision.startswith("refs/"):
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        operations = [CommitOperationAdd(name, data) for name, data in files.items()]
        commit = api.create_commit(repo_id, operations, commit_message=commit_message, revision=revision)
    return str(commit.commit_url)


def check_name(repo_id: str) -> None:
    """ConfigError for what cannot be the name of a repository."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ConfigError(
            f"{repo_id!r} cannot be a repository of the hub; expected OWNER/NAME of letters, digits, '-', '_' and '.'"
        ) from error


@contextmanager
def _one_line(repo_id: str, endpoint: str) -> Iterator[None]:
    """What huggingface_hub raises within the block, in words."""
    from huggingface_hub.errors import HfHubHTTPError, HTTPError, OfflineModeIsEnabled

    try:
        yield
    except HfHubHTTPError as error:
        status = error.response.status_code
        said = f": {' '.join(error.server_message.split())}" if error.server_message else ""
        reasons = {
            401: "the token is not valid; run `hf auth login` again, or set HF_TOKEN",
            403: "the token may not write there; take one of the owner's that may",
            404: "no such repository or revision for this token; check both names, and whose token it is",
        }
        reason = reasons.get(status, f"status {status}")
        raise HubError(f"{endpoint} refuses to take {repo_id} ({status}{said}): {reason}") from error
    except OfflineModeIsEnabled as error:
        raise HubError(f"{repo_id} cannot be sent: HF_HUB_OFFLINE is set; unset it, and send again") from error
    except (HTTPError, OSError) as error:
        raise HubError(
            f"{endpoint} cannot be reached ({in_one_line(error)}); check the network and HF_ENDPOINT, and send again"
        ) from error
    except (ValueError, RuntimeError) as error:  # a model card that the hub does not take; Xet, which sends large files
        raise HubError(f"{repo_id} cannot be sent: {in_one_line(error)}") from error
