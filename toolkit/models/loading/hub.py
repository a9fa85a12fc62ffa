"""Why the hub did not give a model, and what the user can do about it: its errors, told once and in one place.

transformers wraps what huggingface_hub raises into errors of several kinds and many lines; what happened is in the
chain of their causes.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from pathlib import Path

from huggingface_hub import constants
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
)
from huggingface_hub.utils import httpx
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, WEIGHTS_INDEX_NAME, WEIGHTS_NAME
from transformers.utils.hub import cached_file, get_checkpoint_shard_files

# What transformers' `from_pretrained` raises where a model cannot be had; a download that breaks off is no OSError.
NOT_LOADED = (OSError, ValueError, httpx.HTTPError)
LOGIN = "log in with `hf auth login`, or set HF_TOKEN"


def fetch_weights(source: str) -> Path | None:
    """Bring a model's weights into this machine's cache, in the form that ``from_pretrained`` would choose.

    Args:
        source: a hub id; a folder has its weights already.

    Returns:
        the folder that holds them; None where the hub has none in a known form.

    Raises: one of ``NOT_LOADED``.
    """
    if Path(source).is_dir():
        return Path(source)
    for name in (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_NAME, WEIGHTS_INDEX_NAME):
        if path := cached_file(source, name, _raise_exceptions_for_missing_entries=False):
            if name in (SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_INDEX_NAME):
                get_checkpoint_shard_files(source, path)
            return Path(path).parent
    return None


def hub_trouble(error: BaseException, source: str) -> str | None:
    """What the hub has to do with a model that could not be loaded, and the remedy, in words that follow its name.

    Args:
        error: one of ``NOT_LOADED``.
        source: the hub id.

    Returns:
        None where the hub has nothing to do with it.
    """
    hub, cache = constants.ENDPOINT, constants.HF_HUB_CACHE
    elsewhere = f"set HF_HOME to a folder whose hub/models--{source.replace('/', '--')} holds it"
    for cause in _causes(error):
        match cause:
            case GatedRepoError():
                return f"is gated: ask for access at {hub}/{source}, and {LOGIN}"
            case RepositoryNotFoundError():
                return f"is not on the hub ({hub}), or is private: correct its id, or {LOGIN}"
            case RemoteEntryNotFoundError() | httpx.HTTPStatusError():
                pass  # transformers looks for several files, and says itself which of them had to be there
            case HfHubHTTPError() if cause.response.status_code in (401, 403):
                return f"is not for this login: the hub ({hub}) answers {cause.response.status_code}; {LOGIN}"
            case HfHubHTTPError():
                return f"was not to be had: the hub ({hub}) answers {cause.response.status_code}; try again later"
            case LocalEntryNotFoundError() if constants.is_offline_mode():
                return f"is not in the cache ({cache}), and HF_HUB_OFFLINE forbids to ask the hub; {elsewhere}"
            case httpx.ConnectError() | httpx.ConnectTimeout():
                return f"is not in the cache ({cache}), and the hub ({hub}) cannot be reached ({cause}); {elsewhere}"
            case httpx.HTTPError():
                told = str(cause) or type(cause).__name__
                return f"was not downloaded whole from the hub ({hub}: {told}): run the same command again"
            case OSError() if cause.errno in (errno.ENOSPC, errno.EDQUOT):
                return f"does not fit on the disk of the cache ({cache}): set HF_HOME to a larger one"
            case OSError() if cause.errno in (errno.EACCES, errno.EROFS):
                return f"cannot be written to the cache ({cache}): set HF_HOME to a folder of your own"
    return None


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The error, and what it came from."""
    seen: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in seen:
        yield cause
        seen.append(cause)
        cause = cause.__cause__ or cause.__context__
