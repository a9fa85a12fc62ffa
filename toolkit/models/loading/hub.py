"""Downloads from the hub, and what its errors mean.

transformers wraps what huggingface_hub raises into errors of several kinds and many lines; the cause is in their chain.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from huggingface_hub import constants
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    StrictDataclassError,
)
from huggingface_hub.utils import httpx
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, WEIGHTS_INDEX_NAME, WEIGHTS_NAME
from transformers.utils.hub import cached_file, get_checkpoint_shard_files

# What transformers' `from_pretrained` raises where a model cannot be loaded; a download that breaks off is no OSError,
# and a configuration whose values do not go together is no ValueError.
NOT_LOADED = (OSError, ValueError, httpx.HTTPError, StrictDataclassError)
LOGIN = "log in with `hf auth login`, or set HF_TOKEN"


class HubTrouble(NamedTuple):
    """Why a model could not be loaded, in words that follow its name, and the remedy."""

    what: str
    remedy: str


def fetch_weights(source: str) -> Path | None:
    """Download a hub id's weights into this machine's cache, in the form that ``from_pretrained`` would choose.

    Nothing is done for a folder.

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


def hub_trouble(error: BaseException, source: str) -> HubTrouble | None:
    """What went wrong at the hub or in its cache, by one of ``NOT_LOADED``; None if it has another cause."""
    hub, cache = constants.ENDPOINT, constants.HF_HUB_CACHE
    elsewhere = (
        f"download it where the hub can be reached (hf download {source}; for a plan its config.json alone), and set "
        f"HF_HOME to a folder whose hub/models--{source.replace('/', '--')} holds it"
    )
    for cause in _causes(error):
        match cause:
            case HFValidationError():
                return HubTrouble("is neither a folder here nor the id of a model, OWNER/NAME", "correct the path")
            case GatedRepoError():
                return HubTrouble(f"is gated ({hub}/{source})", f"ask for access there, and {LOGIN}")
            case RepositoryNotFoundError():
                return HubTrouble(f"is not on the hub ({hub}), or is private", f"correct its id, or {LOGIN}")
            case RemoteEntryNotFoundError() | httpx.HTTPStatusError():
                pass  # transformers looks for several files, and says itself which of them is missing
            case HfHubHTTPError() if cause.response.status_code in (401, 403):
                return HubTrouble(f"is not for this login: the hub ({hub}) answers {cause.response.status_code}", LOGIN)
            case HfHubHTTPError():
                return HubTrouble(
                    f"cannot be downloaded: the hub ({hub}) answers {cause.response.status_code}", "try again later"
                )
            case LocalEntryNotFoundError() if constants.is_offline_mode():
                return HubTrouble(
                    f"is not in the cache ({cache}), and HF_HUB_OFFLINE forbids asking the hub", elsewhere
                )
            case httpx.ConnectError() | httpx.ConnectTimeout():
                return HubTrouble(
                    f"is not in the cache ({cache}), and the hub ({hub}) cannot be reached ({cause})", elsewhere
                )
            case httpx.HTTPError():
                reason = str(cause) or type(cause).__name__
                return HubTrouble(
                    f"was not downloaded whole from the hub ({hub}: {reason})", "run the same command again"
                )
            case OSError() if cause.errno in (errno.ENOSPC, errno.EDQUOT):
                return HubTrouble(f"does not fit on the disk of the cache ({cache})", "set HF_HOME to a larger one")
            case OSError() if cause.errno in (errno.EACCES, errno.EROFS):
                return HubTrouble(f"cannot be written to the cache ({cache})", "set HF_HOME to a folder of your own")
    return None


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The error and those that caused it."""
    seen: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in seen:
        yield cause
        seen.append(cause)
        cause = cause.__cause__ or cause.__context__
