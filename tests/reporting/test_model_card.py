from __future__ import annotations

from toolkit.models import PoseFeatureExtractor
from toolkit.poses.landmarks import load_landmark_set
from toolkit.reporting.model_card import _inputs


def test_the_card_says_how_to_give_the_conditions_of_a_clip() -> None:
    landmarks = load_landmark_set("hands_body_50").to_dict()
    assert "conditions" not in _inputs(PoseFeatureExtractor(landmark_set=landmarks))
    extractor = PoseFeatureExtractor(landmark_set=landmarks, prefix_template="{language} to {target_language}:")
    row = _inputs(extractor)["conditions"]
    assert '[{"language": "...", "target_language": "..."}]' in row and "`--target-language`" in row
