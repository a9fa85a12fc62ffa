"""Long lists of cases: a few are trained by day (``make test``), all of them by night (``make test-nightly``)."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def cases(names: Iterable[Any], by_day: Collection[Any]) -> list[Any]:
    """The parameters ``names`` of a test, of which those that are not ``by_day`` are nightly."""
    return [name if name in by_day else pytest.param(name, marks=pytest.mark.nightly) for name in names]


def is_night(request: pytest.FixtureRequest) -> bool:
    """Whether nightly tests of the module of ``request`` were selected, so that its fixtures must train their cases."""
    items = (item for item in request.session.items if item.path == request.path)
    return any(item.get_closest_marker("nightly") for item in items)
