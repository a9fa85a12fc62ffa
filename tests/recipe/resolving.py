"""Resolve a recipe in a test, or get the error that it is refused with."""

from __future__ import annotations

import json

import pytest

from toolkit.errors import UserError
from toolkit.recipe.resolve import resolve_named


def run_of(name="t5_small", *overrides, ds=None, world_size=1, has_gpu=False, needs_data=False):
    return resolve_named(name, overrides, world_size, has_gpu=has_gpu, ds=ds, needs_data=needs_data)


def error_of(*args, **kwargs):
    with pytest.raises(UserError) as caught:
        run_of(*args, **kwargs)
    assert "\n" not in caught.value.message and "\n" not in caught.value.hint
    return caught.value


def write(path, value):
    path.write_text(json.dumps(value), encoding="utf-8")
    return str(path)
