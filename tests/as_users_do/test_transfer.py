"""What docs/transfer.md and docs/data.md add to a recipe, as it is shipped: stopped, resumed exactly, and used.

Nothing else is set: two ranks, three epochs, loader processes, and evaluations with the recipe's beams.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.as_users_do.conftest import User
from tests.as_users_do.life import FEATURES_FPS, Life, entries_of, live, use
from tests.as_users_do.whole_runs import run_without_a_stop
from tests.written_features import write_features

RECIPE, RANKS, WIDTH = "t5_small", 2, 48


@pytest.fixture
def user(at_first_contact: User) -> User:
    return at_first_contact


@pytest.fixture(scope="module")
def features(many_clips: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("features")
    write_features(many_clips / "poses", folder, WIDTH, FEATURES_FPS)
    return folder


def resumed_exactly(user: User, life: Life) -> None:
    """Every loss and every score is that of a run without a stop."""
    whole = run_without_a_stop(user, life, RANKS)
    found, wanted = (
        [(entry["step"], entry["loss"]) for entry in entries if entry["kind"] == "train"]
        for entries in (life.entries, entries_of(whole))
    )
    assert found == wanted
    scores = [json.loads((each / "scores.json").read_text())["scores"] for each in (life.folder, whole)]
    assert scores[0] == scores[1]


@pytest.mark.nightly
@pytest.mark.parametrize("poses", [False, True], ids=["alone", "beside poses"])
def test_features(user: User, features: Path, poses: bool) -> None:
    given = [f"data.features={features}", f"data.features_fps={FEATURES_FPS}"]
    table = user.data if poses else user.data[:2]
    life = live(user, RECIPE, RANKS, data=[*table, *given], name=f"features_{poses}")
    use(user, life, features=features, reads_poses=poses)
    resumed_exactly(user, life)


@pytest.mark.nightly
def test_a_trimmed_vocabulary_and_from_it_a_mix_of_two_corpora(user: User, many_clips: Path, tmp_path: Path) -> None:
    trimmed = live(user, RECIPE, RANKS, data=[*user.data, "model.vocabulary=corpus"], name="trimmed")
    use(user, trimmed)
    resumed_exactly(user, trimmed)
    restored = user.run("launch/export.py", "runs/trimmed", "--to", "exported/whole", "--restore-vocabulary", "--json")
    assert restored.code == 0 and restored.json["restored_tokens"] > 0, restored.err

    head, *rows = (many_clips / "table.csv").read_text().splitlines()
    for name, chosen in {"odd": rows[::2], "even": rows[1::2]}.items():
        (tmp_path / f"{name}.csv").write_text("\n".join([head, *chosen]) + "\n")
    clips = sum(",train" in row for row in rows)
    poses = str(many_clips / "poses")
    parts = [
        {"table": str(tmp_path / "odd.csv"), "poses": poses, "weight": [2, 1], "prefix": "signed {language}:"},
        {"table": str(tmp_path / "even.csv"), "poses": poses, "weight": 1, "language": "gsg"},
    ]
    data = [f"data.corpora={json.dumps(parts)}", f"data.epoch_clips={clips}", "model.init_from=runs/trimmed"]
    mixed = live(user, RECIPE, RANKS, data=data, name="mixed", clips=clips)
    assert {"test", "test@odd", "test@even"} <= json.loads((mixed.folder / "scores.json").read_text())["splits"].keys()
    assert (mixed.folder / "init_from.json").exists()
    resumed_exactly(user, mixed)
    use(user, mixed)
