"""Uploads files to the Hub as one commit. Access is checked before the first byte, and calls that may succeed later are retried.

An interrupted push does not upload the same files again, because the Hub identifies files by their content. Local files are
never changed or deleted.
"""

from __future__ import annotations

import random
import re
import time
import warnings
from collections.abc import Mapping
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, OfflineModeIsEnabled
from huggingface_hub.utils import validate_repo_id

from ..core.errors import PartialResult, UserError
from ..core.files import CARD_FILE

TRIES = 6
LONGEST_PAUSE_S = 30.0  # between two tries, if the Hub does not say how long to wait
LONGEST_WAIT_S = 120.0  # if the Hub asks for it; a push that would have to wait longer ends, and can be continued later
CONNECTION_LIBRARIES = ("httpx", "httpx2", "httpcore", "requests")
REFUSALS = {
    401: "expected a token that the Hub knows, found one that it does not. Type hf auth login",
    403: "expected a token that may write there, found one that may not. Type hf auth login with another, or another --repo_id",
    404: "expected a repository or branch that exists and that the token may see, found none. Check the name",
    400: "the Hub refuses the request",
    422: "the Hub refuses the request",
}


def push_files(
    files: Mapping[str, Path | bytes],
    repo_id: str,
    repo_type: str,
    message: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    token: str | None = None,
    replaces: re.Pattern | None = None,
    marker: str | None = None,
) -> str:
    """Writes files to a repository in one commit. Files that are already there are not uploaded.

    Args:
        files: local files or their content, by path in the repository.
        repo_id: `user/name` or `organization/name`.
        repo_type: `model` or `dataset`.
        private: whether a new repository is private.
        revision: branch, created if it is missing. Default: main.
        create_pr: open a pull request, which leaves the branch as it is.
        token: default: the one of `hf auth login` or `HF_TOKEN`.
        replaces: files of the repository to delete if they are not among `files`.
        marker: a file that every repository of this kind has. A repository with other files but without it is refused.

    Returns:
        The URL of the commit or pull request.

    Raises:
        UserError: no token, a wrong or read-only token, no write access to the name, an invalid name, no such branch.
        PartialResult: the Hub kept failing; the same push continues.
    """
    api = HfApi(token=token)
    where = {"repo_id": check_access(repo_id, token, create_pr), "repo_type": repo_type}
    listed = check_name(**where, marker=None if create_pr else marker, token=token)
    operations: list = [
        CommitOperationAdd(path, content if isinstance(content, bytes) else str(content))
        for path, content in sorted(files.items())
    ]
    if not (create_pr and listed):  # opening a pull request does not need the right to create a repository
        make_repo(**where, private=private, revision=None if create_pr else revision, token=token)
    if replaces:
        if revision and not create_pr:
            listed = _retry(lambda: api.list_repo_files(**where, revision=revision), repo_id)
        operations += [CommitOperationDelete(path) for path in listed if replaces.fullmatch(path) and path not in files]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="It seems that you are about to commit a data file")  # predictions
        # The operations remember what was uploaded, so a further try only commits.
        options = {"commit_message": message, "revision": revision, "create_pr": create_pr}
        commit = _retry(lambda: api.create_commit(**where, operations=operations, **options), repo_id)
    return commit.pr_url if create_pr else commit.commit_url


def make_repo(
    repo_id: str, repo_type: str, private: bool | None = None, revision: str | None = None, token: str | None = None
) -> None:
    """Creates a repository and a branch unless they exist.

    Raises: as `push_files`.
    """
    api, where = HfApi(token=token), {"repo_id": repo_id, "repo_type": repo_type}
    _retry(lambda: api.create_repo(**where, private=private, exist_ok=True), repo_id)
    if revision:
        _retry(lambda: api.create_branch(**where, branch=revision, exist_ok=True), repo_id)


def check_access(repo_id: str, token: str | None = None, proposes: bool = False) -> str:
    """Checks that this token may write there, as far as that can be known without writing. Returns the full name, `owner/name`.

    Args:
        proposes: only a pull request is to be opened, which anybody may do.

    Raises:
        UserError: what is missing, and what to type.
    """
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise UserError(f"--repo_id: expected user/name, found {repo_id!r}. {str(error).splitlines()[0]}") from error
    try:
        who = _retry(lambda: HfApi(token=token).whoami(), repo_id)
    except LocalTokenNotFoundError as error:
        raise UserError("expected a token of the Hub, found none. Type hf auth login, or export HF_TOKEN=…") from error
    auth = (who.get("auth") or {}).get("accessToken") or {}
    if auth.get("role") == "read":
        raise UserError(
            f"expected a token that may write, found {auth.get('displayName') or 'one'!s} of {who['name']}, which may only read. "
            "Create another one on the Hub (Settings, Access Tokens), and type hf auth login."
        )
    owner = repo_id.split("/")[0] if "/" in repo_id else who["name"]
    names = [who["name"], *(org["name"] for org in who.get("orgs") or ())]
    if owner not in names and not proposes:
        raise UserError(
            f"--repo_id {repo_id}: expected a name that begins with {' or '.join(f'{name}/' for name in names)}, since the "
            f"token belongs to {who['name']}; found {owner}/."
        )
    return f"{owner}/{repo_id.split('/')[-1]}"


def check_name(repo_id: str, repo_type: str, marker: str | None = None, token: str | None = None) -> list[str]:
    """The files of a repository; none if there is no such repository yet.

    Args:
        marker: a file that every repository of this kind has.

    Raises:
        UserError: the repository has other files but not that one, so they belong to something else.
    """
    listed = _retry(lambda: HfApi(token=token).list_repo_files(repo_id, repo_type=repo_type), repo_id, missing=[])
    if marker and marker not in listed and set(listed) - {".gitattributes", CARD_FILE}:
        raise UserError(
            f"{repo_id}: expected a new {repo_type} repository or one that mmft-hf pushed, found one with other files "
            f"({', '.join(sorted(listed)[:4])}, …). Type another name, or --create_pr true to propose it there."
        )
    return listed


def _retry(call, repo_id: str, missing=None):
    """The result of a call to the Hub, with retries. Returns `missing`, if given, where the Hub finds nothing."""
    for attempt in range(1, TRIES + 1):
        try:
            return call()
        except (LocalTokenNotFoundError, UserError):
            raise
        except OfflineModeIsEnabled as error:
            raise UserError(
                "expected a connection to the Hub, found offline mode. Type unset HF_HUB_OFFLINE, and push again."
            ) from error
        except HfHubHTTPError as error:
            status = error.response.status_code if error.response is not None else None
            if status == 404 and missing is not None:
                return missing
            if status in REFUSALS:
                said = " ".join((error.server_message or "").split())[:200]
                raise UserError(f"{repo_id}: {REFUSALS[status]}{f' ({said})' if said else ''}.") from None
            hint = error.response.headers.get("Retry-After", "") if error.response is not None else ""
            wait, reason = float(hint) if hint.isdigit() else None, f"HTTP {status}"
        except Exception as error:
            if str(error).startswith("Invalid metadata in README.md"):
                said = " ".join(str(error).split())
                raise UserError(
                    f"{repo_id}: the Hub refuses the card: {said}. Correct README.md, or type another --license."
                ) from None
            # A failed upload comes as a RuntimeError with a cause. It is worth a retry, because the URLs for uploads are
            # signed again.
            cause = error.__cause__ if isinstance(error, RuntimeError) else error
            connection = type(cause).__module__.split(".")[0] in CONNECTION_LIBRARIES
            if not connection and not isinstance(cause, (HfHubHTTPError, ConnectionError, TimeoutError)):
                raise
            wait, reason = None, f"the connection failed: {type(cause).__name__}"
        if attempt == TRIES or (wait or 0) > LONGEST_WAIT_S:
            asked = f", and asks to wait {wait:.0f} s" if wait else ""
            raise PartialResult(
                f"{repo_id}: the Hub did not accept it ({reason}{asked}). What was uploaded is kept there, and everything is kept "
                "here.",
                again=True,
            )
        time.sleep(wait if wait is not None else random.uniform(0, min(LONGEST_PAUSE_S, 0.5 * 2**attempt)))
    raise AssertionError("unreachable")
