"""Errors of a pull by the hub, the network or the disk, in one sentence, and what to do about them."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager

from k2cli.texts import display_safe
from model import library
from model.errors import K2Error

PULL_AGAIN = "What has arrived is kept: pull again to resume."


@contextmanager
def hub_errors(repo: str, revision: str) -> Iterator[None]:
    """Turn errors within the context into that sentence. Raises K2Error."""
    from huggingface_hub import errors
    from huggingface_hub.utils import disable_progress_bars, logging

    logging.set_verbosity_error()  # k2 shows its own bar and reports an error once
    disable_progress_bars()
    try:
        yield
    except (errors.HTTPError, OSError) as error:
        raise hub_error(error, repo, revision) from None


def hub_error(error: Exception, repo: str, revision: str) -> K2Error:
    from huggingface_hub import constants, errors

    hub = constants.ENDPOINT
    status = getattr(getattr(error, "response", None), "status_code", 0)
    error_number = getattr(error, "errno", None)
    if isinstance(error, errors.GatedRepoError) and status == 401:
        return K2Error(
            f"{repo} is gated, and the hub does not know who you are (401).",
            hint=f"Accept its licence at {hub}/{repo}, make a token at {hub}/settings/tokens, and set HF_TOKEN to it.",
        )
    if isinstance(error, errors.GatedRepoError):
        return K2Error(
            f"{repo} is gated, and your account has no access ({status}).",
            hint=f"Accept its licence at {hub}/{repo} with the account of your HF_TOKEN; a fine-grained token"
            " must be allowed to read gated repositories.",
        )
    if isinstance(error, errors.RevisionNotFoundError):
        hint = f"Give a branch, a tag or a commit: {hub}/{repo}/commits/main lists them."
        return K2Error(f'{repo} has no revision "{display_safe(revision)}" (404).', hint=hint)
    if isinstance(error, errors.RepositoryNotFoundError):
        hint = f"Check the name at {hub}. For a private model, set HF_TOKEN."
        return K2Error(f"The hub has no model {repo}, or it is private ({status}).", hint=hint)
    if status in (401, 403):
        hint = f"Check HF_TOKEN: it may be wrong, expired, or not allowed to read this ({hub}/settings/tokens)."
        return K2Error(f"The hub refuses the token for {repo} ({status}).", hint=hint)
    if status == 404:
        hint = "If HF_ENDPOINT names a mirror, it may be incomplete: try another, or none."
        return K2Error(f"{hub} does not have a file that it lists for {repo} (404).", hint=hint)
    if status == 429:
        hint = f"Wait a few minutes. With HF_TOKEN set, the limits are higher. {PULL_AGAIN}"
        return K2Error("The hub gets too many requests from here (429).", hint=hint)
    if status:
        return K2Error(f"The hub at {hub} reports an error ({status}).", hint=f"Try again later. {PULL_AGAIN}")
    if isinstance(error, errors.OfflineModeIsEnabled):
        return K2Error(f"{repo} is not on this machine, and HF_HUB_OFFLINE is set.", hint="Unset it to pull.")
    if error_number in (errno.ENOSPC, errno.EDQUOT):
        hint = f"Free some space, or set HF_HOME to a folder on a larger disk. {PULL_AGAIN}"
        return K2Error(f"The disk of {library.hub_cache()} is full.", hint=hint)
    if isinstance(error, OSError) and error.filename:
        hint = "Check its permissions, or set HF_HOME to another folder."
        return K2Error(f"{error.filename} cannot be written: {error.strerror}.", hint=hint)
    return K2Error(f"The connection to {hub} failed.", hint=f"Check the network. {PULL_AGAIN}")
