from __future__ import annotations

import pytest

from toolkit.models import PoseFeatureExtractor
from toolkit.poses.landmarks import NO_LANDMARKS, load_landmark_set
from toolkit.reporting.model_card import _inputs, _usage


def test_the_card_says_how_to_give_the_conditions_of_a_clip() -> None:
    landmarks = load_landmark_set("hands_body_50").to_dict()
    assert "conditions" not in _inputs(PoseFeatureExtractor(landmark_set=landmarks))
    extractor = PoseFeatureExtractor(landmark_set=landmarks, prefix_template="{language} to {target_language}:")
    row = _inputs(extractor)["conditions"]
    assert '[{"language": "...", "target_language": "..."}]' in row and "`--target-language`" in row


@pytest.mark.parametrize("points", [True, False])
def test_the_card_says_how_to_give_features(points: bool) -> None:
    landmarks = load_landmark_set("hands_body_50") if points else NO_LANDMARKS
    usage = _usage(PoseFeatureExtractor(landmark_set=landmarks.to_dict(), num_features=768))
    assert "video_features=" in usage["call"] and ("clip.pose" in usage["call"]) == points
    assert ("--features clip.npy" in usage["files"]) == points and "clip.npy" in usage["files"]
    assert "768" in usage["reads"] and (".pose" in usage["reads"]) == points
