"""A run that reads features takes of a source what both read; the rest is new, and a note says so."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.models.warm_start.makers import HANDS, Made, corpus_of, make, save, with_features
from toolkit.corpus.packed import Corpus

NO_CTC = ("training.ctc_weight=0", "model.feature_encoder={hidden: 16, dropout: 0}")


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Corpus]:
    folder = tmp_path_factory.mktemp("corpora")
    poses = corpus_of(folder / "poses", HANDS)
    return {
        "poses": poses,
        "both": with_features(poses, folder / "both", 12),
        "features": with_features(poses, folder / "features", 12, poses=False),
        "wider": with_features(poses, folder / "wider", 20),
    }


def encoder_of(made: Made) -> dict[str, torch.Tensor]:
    return made.model.pose_encoder.state_dict()


@pytest.mark.parametrize(
    ("source", "run", "poses", "features"),
    [
        ("poses", "both", True, False),
        ("both", "both", True, True),
        ("both", "poses", True, False),
        ("both", "wider", True, False),
        ("both", "features", False, True),
        ("features", "both", False, True),
        ("poses", "features", False, False),
    ],
)
def test_encoders_come_from_the_source_where_it_has_them(
    corpora: dict[str, Corpus], tmp_path: Path, source: str, run: str, poses: bool, features: bool
) -> None:
    before = make(corpora[source], *NO_CTC, seed=1)
    folder = save(tmp_path / "source" / "best", before)
    after = make(corpora[run], *NO_CTC, f"model.init_from={folder}", seed=9)
    theirs, ours = encoder_of(before), encoder_of(after)

    def part(tensors: dict[str, torch.Tensor], of_features: bool, has_both: bool) -> dict[str, torch.Tensor]:
        prefix = "features." if of_features else "poses." if has_both else ""
        mine = {key: value for key, value in tensors.items() if key.startswith("features.") == of_features}
        return {key.removeprefix(prefix): value for key, value in mine.items()}

    for of_features, is_taken in ((False, poses), (True, features)):
        known = part(theirs, of_features, source not in ("poses",))
        for name, tensor in part(ours, of_features, run not in ("poses",)).items():
            if name in known and tensor.shape == known[name].shape and tensor.unique().numel() > 1:
                assert torch.equal(tensor, known[name]) == is_taken, (name, of_features)
    assert after.plan
    assert any("features" in note for note in after.plan.notes) == (not features and source != run)
