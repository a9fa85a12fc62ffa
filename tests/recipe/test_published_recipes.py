"""A recipe that trains as a paper does holds the paper's values, whatever its parents and the defaults become."""

from __future__ import annotations

import pytest

from tests.recipe.resolving import run_of
from toolkit.recipe.schema import Augmentation


@pytest.mark.parametrize("world_size", [1, 4])
def test_mt5_base_unisign_is_the_third_stage_of_uni_sign_without_rgb(world_size: int) -> None:
    """Li et al. 2025, arXiv:2501.15187, and the settings of its published code: pose only, fine-tuned to translate."""
    run = run_of("mt5_base_unisign", world_size=world_size, has_gpu=True)
    data, model, training, evaluation = run.recipe.data, run.recipe.model, run.recipe.training, run.recipe.evaluation
    assert (data.landmarks, data.fps, data.max_frames, data.too_long) == ("unisign_69", 25, 256, "subsample")
    assert model.backbone == "mt5_base" and not model.from_scratch and model.lora is None and not model.freeze
    assert model.prefix == "Translate sign language video to English:"
    encoder = model.pose_encoder
    assert (encoder.kind, encoder.hidden, encoder.layers, encoder.kernel, encoder.stride) == ("stgcn", 256, 3, 5, 1)
    assert encoder.dropout == 0
    assert (training.epochs, run.deepspeed["train_batch_size"]) == (20, 32)
    assert run.deepspeed["gradient_clipping"] == 1.0 and run.zero_stage == 2 and run.precision == "bf16"
    optimizer = run.deepspeed["optimizer"]
    given = {key: optimizer["params"][key] for key in ("lr", "betas", "eps", "weight_decay")}
    assert optimizer["type"] == "AdamW"
    assert given == {"lr": 3e-4, "betas": [0.9, 0.999], "eps": 1e-9, "weight_decay": 1e-4}
    assert (training.schedule, training.warmup_ratio, training.layer_decay) == ("cosine", 0, 1)
    assert (training.pose_encoder_learning_rate, training.freeze_backbone_steps, training.ema) == (None, 0, None)
    assert (training.label_smoothing, training.max_target_tokens, training.ctc_weight) == (0.2, 50, 0)
    assert run.recipe.augmentation == Augmentation()
    assert (evaluation.num_beams, evaluation.length_penalty, evaluation.max_new_tokens) == (4, 1.0, 100)
    assert (evaluation.no_repeat_ngram_size, evaluation.forced_language) == (0, None)
