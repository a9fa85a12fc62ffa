"""Files and the places for them."""

from __future__ import annotations

from pathlib import Path

import pytest

from toolkit.errors import UserError
from toolkit.files import check_place


@pytest.mark.parametrize("place", ["file", "file/runs/mine"])
def test_a_place_where_no_folder_can_be_is_refused_at_once(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_text("of a user")
    with pytest.raises(UserError) as raised:
        check_place(tmp_path / place, f"run.dir={place}", "set another run.dir")
    assert f"run.dir={place}" in raised.value.message and str(tmp_path / "file") in raised.value.message
    check_place(tmp_path / "new" / "runs" / "mine", "run.dir", "")
    assert not (tmp_path / "new").exists()
