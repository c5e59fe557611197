"""From a folder to a Hub repository, in one commit.

A repository either has all files of the new state or is as it was: an upload that breaks off in the middle leaves nothing but
what the next one takes up. The commit is made on top of the state that was looked at, so that work of others is never
overwritten unseen, and afterwards the repository is asked whether it holds what was sent.
"""

import os
from dataclasses import dataclass
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError
from huggingface_hub.utils import validate_repo_id

from .manifest import first_line
from .publishable import Publishable, check_publishable


# That of the client's HTTP library, whichever a release uses: a connection that fails is not an `OSError` in all of them.
_TRANSPORT = tuple(base for base in HfHubHTTPError.__mro__ if base.__name__ == "HTTPError")
_KEPT = ".gitattributes"  # the Hub writes it by itself


class PublishError(OSError):
    """A Hub that refused or could not be reached; the message says what the repository holds now and what to do."""


@dataclass(frozen=True)
class Published:
    """What was published.

    Attributes:
        url (`str`): The page of the repository.
        commit (`str`): Its newest commit; give it as `revision` where a result must be repeatable.
        changed (`bool`): `False` if the repository held all of it already.
    """

    url: str
    commit: str
    changed: bool


def check_repo_id(repo_id: Any) -> str:
    """Returns a Hub id `owner/name`, or raises a `ValueError` that says what is wrong with it."""
    if not isinstance(repo_id, str) or repo_id.count("/") != 1:
        raise ValueError(f"repo_id={repo_id!r} is not a Hub id; give owner/name")
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(f"repo_id={repo_id!r} is not a Hub id ({first_line(error)}); give owner/name") from error
    return repo_id


def publish(
    folder: str | os.PathLike[str],
    repo_id: str,
    *,
    space: bool = False,
    private: bool = False,
    prune: bool = False,
    source_url: str | None = None,
    token: str | bool | None = None,
) -> Published:
    """Checks a folder and makes a Hub repository hold exactly its files.

    It may be called again at any time: after an interruption it completes what is missing, without a change it makes no
    commit, and with changes it makes one.

    Args:
        folder (`str` or `os.PathLike`): A folder that [`check_publishable`] accepts.
        repo_id (`str`): Hub id `owner/name`. The repository is created if there is none.
        space (`bool`, *optional*, defaults to `False`): Whether it is a Gradio Space.
        private (`bool`, *optional*, defaults to `False`): Whether a repository that is created here is private.
        prune (`bool`, *optional*, defaults to `False`):
            Whether files of the repository that the folder lacks are removed in the same commit. Otherwise they are an error.
        source_url (`str`, *optional*):
            As in [`check_publishable`]: where links of the card that lead out of the folder shall lead.
        token (`str` or `bool`, *optional*): Access token with the right to write; by default that of `hf auth login`.

    Returns:
        [`Published`]: Where it is.

    Raises:
        UnpublishableError: If something is wrong with the folder.
        ValueError: If `repo_id` is not a Hub id, `source_url` no address or the folder in no git checkout, or the repository has
            files that the folder lacks.
        PublishError: If the Hub refuses, cannot be reached, or somebody else changed the repository meanwhile.

    Example:
        ```python no-run
        from diffusers_ext.publishing import publish

        print(publish("pipelines/emoji-scenes-64", "me/emoji-scenes-64").url)
        ```
    """
    check_repo_id(repo_id)
    checked = check_publishable(folder, space=space, source_url=source_url)
    api = HfApi(token=token)
    where: dict[str, Any] = {"repo_id": repo_id, "repo_type": "space" if space else "model"}
    url = ""
    try:
        sdk = {"space_sdk": "gradio"} if space else {}
        # None, not False: where an organisation makes repositories private by default, that stays so.
        url = str(api.create_repo(**where, private=private or None, exist_ok=True, **sdk))
        before = api.repo_info(**where)
        strangers = {file.rfilename for file in before.siblings or ()} - checked.sizes.keys() - {_KEPT}
        if strangers and not prune:
            raise ValueError(
                f"{repo_id} has files that {checked.folder} lacks ({_some(strangers)}); give prune=True (--prune) to remove "
                "them in the same commit, or publish under another name"
            )
        operations: list[Any] = [
            CommitOperationAdd(path_in_repo=name, path_or_fileobj=checked.replaced.get(name, checked.folder / name))
            for name in checked.sizes
        ]
        operations += [CommitOperationDelete(path_in_repo=name) for name in sorted(strangers)]
        commit = api.create_commit(
            **where,
            operations=operations,
            commit_message=f"Publish {checked.folder.resolve().name}",
            parent_commit=before.sha,
        )
        _check_arrived(api, where, commit.oid, checked)
    except (*_TRANSPORT, OSError) as error:
        if isinstance(error, PublishError):
            raise
        raise PublishError(_sentence(error, repo_id, bool(url))) from error
    return Published(url, commit.oid, commit.oid != before.sha)


def _check_arrived(api: HfApi, where: dict[str, Any], commit: str, checked: Publishable) -> None:
    there = {
        item.path: item.size
        for item in api.list_repo_tree(**where, revision=commit, recursive=True)
        if hasattr(item, "size")
    }
    if wrong := {name for name, size in checked.sizes.items() if there.get(name) != size}:
        raise PublishError(f"{where['repo_id']} does not hold {_some(wrong)} as sent; publish it again")


def _some(names: set[str]) -> str:
    shown = ", ".join(sorted(names)[:3])
    return f"{shown} and {len(names) - 3} more" if len(names) > 3 else shown


def _sentence(error: BaseException, repo_id: str, created: bool) -> str:
    response = getattr(error, "response", None)
    status = getattr(response, "status_code", None)
    state = "its files are as they were" if created else "nothing was created"
    if status == 401 or isinstance(error, LocalTokenNotFoundError):
        return f"the Hub does not know you ({state}): log in with `hf auth login`, or set HF_TOKEN"
    if status == 403:
        return f"you have no right to write to {repo_id} ({state}): use a token with write access, or another owner"
    if status in (409, 412):
        return f"{repo_id} was changed by somebody else meanwhile ({state}): look at it, and publish again"
    if status is not None:
        return f"the Hub refused {repo_id} ({state}): {first_line(error)}"
    reason = first_line(error)
    return f"the upload to {repo_id} broke off ({state}): {reason}; publish it again when the Hub can be reached"
