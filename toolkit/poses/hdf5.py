"""Read HDF5 files into named arrays: datasets that lie whole in the file, none larger than a clip."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from toolkit.errors import UserError
from toolkit.poses.compressed import check_size
from toolkit.poses.pose_file import PoseError

HDF5 = b"\x89HDF\r\n\x1a\n"
"""First bytes of such a file."""
_MOST_OBJECTS = 1000  # datasets and groups


def read_hdf5(content: bytes, names: Sequence[str], rate_name: str) -> tuple[dict[str, Any], Any]:
    """The dataset that has one of these names, or the only one under any name and in any group; and the frame rate.

    Args:
        content: of the file.
        names: of a dataset that is not in a group; the first that is there is read.
        rate_name: of the frame rate: an attribute of the dataset, of one of its groups or of the file, or a dataset.

    Returns:
        the array by its name, None where it holds no numbers; where it is not clear which is meant, all names without
        arrays. And the frame rate, or None.

    Raises:
        PoseError: the file has too many objects; the dataset is larger than a clip, lies in other files or was not
            written to its end. Damaged files raise the errors of h5py.
        UserError: h5py is not installed.
    """
    try:
        import h5py  # type: ignore[import-untyped]
    except ImportError as error:
        raise UserError(
            "features in .h5 files need h5py, which is not installed",
            'pip install "sign-language-translation-toolkit[hdf5]", or write them as .npy files',
        ) from error
    with h5py.File(io.BytesIO(content), "r") as file:
        objects = _objects(file)
        found = {name: each for name, each in objects.items() if isinstance(each, h5py.Dataset)}
        rate = found.pop(rate_name, None)
        name = next((name for name in names if name in found), None)
        name = next(iter(found)) if name is None and len(found) == 1 else name
        if name is None:
            return dict.fromkeys(found), _number(rate)
        # What stands nearer to the dataset counts.
        parents = [objects.get(name.rsplit("/", up)[0], file) for up in range(name.count("/") + 1)]
        claims = (each.attrs.get(rate_name) for each in (found[name], *parents, file))
        claim = next((claim for claim in claims if claim is not None), rate)
        return {name: _values(found[name], name)}, _number(claim)


def _objects(file: Any) -> dict[str, Any]:
    """Datasets and groups by their path; links to other places and files are not followed."""
    objects: dict[str, Any] = {}

    def visit(name: str, found: Any) -> bool | None:
        objects[name] = found
        return len(objects) > _MOST_OBJECTS or None

    if file.visititems(visit):
        raise PoseError(f"the .h5 file holds more than {_MOST_OBJECTS:,} datasets and groups", "write one array a file")
    return objects


def _number(claim: Any) -> Any:
    return None if claim is None else np.asarray(claim[()] if hasattr(claim, "id") else claim).item()


def _values(dataset: Any, name: str) -> npt.NDArray[Any] | None:
    """The array of a dataset; None where it holds no numbers."""
    if dataset.dtype.kind not in "fiu" or dataset.shape is None:
        return None
    if dataset.external or dataset.is_virtual:
        raise PoseError(f"the dataset {name} lies in other files", "write its values into the file itself")
    check_size(dataset.nbytes)
    # What was not written would be read as zeros.
    wanted = math.prod(-(-size // part) for size, part in zip(dataset.shape, dataset.chunks or (), strict=False))
    written = dataset.id.get_num_chunks() if dataset.chunks else int(dataset.id.get_storage_size() > 0)
    if dataset.size and written < wanted:
        raise PoseError(
            f"the dataset {name} was not written to its end: {written} of {wanted} parts are there",
            "make the features again from their video",
        )
    return np.asarray(dataset)
