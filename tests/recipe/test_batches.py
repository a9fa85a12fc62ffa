"""How many micro-batches of which size a step has, in words, too; tests/batching/test_order.py sees it happen."""

import pytest

from tests.recipe.resolving import error_of, run_of
from toolkit.recipe.batches import MicroBatchChoice, batch_in_words, micro_batch_sizes, num_micro_batches
from toolkit.recipe.load import load_recipe, recipe_names
from toolkit.recipe.resolve import ResolvedRun


@pytest.mark.parametrize(
    ("clips", "world_size", "limit", "number", "sizes", "words"),
    [
        (128, 8, 16, 1, (16, 16), "128 clips = 8 ranks x 1 micro-batch of 16"),
        (32, 8, 16, 1, (4, 4), "32 clips = 8 ranks x 1 micro-batch of 4"),
        (128, 6, 16, 2, (10, 11), "128 clips = 6 ranks x 2 micro-batches of 10 or 11"),
        (8, 1, 3, 3, (2, 3), "8 clips = 1 rank x 3 micro-batches of 2 or 3"),
        (7, 2, 1, 4, (0, 1), "7 clips = 2 ranks x 4 micro-batches of 0 or 1"),
    ],
)
def test_as_few_as_the_limit_allows_and_as_equal_as_they_can_be(clips, world_size, limit, number, sizes, words):
    assert num_micro_batches(clips, world_size, limit) == number
    assert micro_batch_sizes(clips, world_size, limit) == sizes
    assert batch_in_words(clips, world_size, limit, None) == words


def test_a_frame_budget_leaves_the_number_open():
    words = "128 clips over 6 ranks, in micro-batches of at most 16 clips and 4000 frames"
    assert batch_in_words(128, 6, 16, 4000) == words


@pytest.mark.parametrize("name", recipe_names())
def test_recipes_leave_batches_to_the_hardware(name):
    recipe = load_recipe(name)
    assert (recipe.training.micro_batch_size, recipe.evaluation.batch_frames) == ("auto", "auto")


def test_auto_is_a_micro_batch_size_that_is_chosen_later(tmp_path):
    run = run_of("t5_small", world_size=6)
    assert run.recipe.training.micro_batch_size == "auto"
    assert run.batch.endswith("(training.micro_batch_size=auto)")
    chosen = run.with_choice(MicroBatchChoice(16, 4000, "it fits", "6 GPUs", "1"))
    assert (chosen.clip_limit, chosen.frame_limit) == (16, 4000)
    assert (chosen.micro_batch_size, chosen.accumulation_steps) == (11, 2)
    assert chosen.deepspeed["train_micro_batch_size_per_gpu"] == 11
    assert chosen.deepspeed["train_batch_size"] == 6 * 2 * 11
    assert chosen.batch == "128 clips over 6 ranks, in micro-batches of at most 16 clips and 4000 frames"
    chosen.save(tmp_path)
    again = ResolvedRun.load(tmp_path)
    assert again.choice == chosen.choice
    assert again.recipe.training.micro_batch_size == "auto"
    run_of("t5_small", "training.micro_batch_size=16", world_size=6).save(tmp_path)
    assert not (tmp_path / "micro_batch.json").exists(), "a number was chosen by nobody"


def test_generation_batches_that_were_chosen_are_kept_with_the_run(tmp_path):
    choice = MicroBatchChoice(16, 4000, "it fits", "6 GPUs", "1", batch_frames=2048)
    run_of("t5_small", world_size=6).with_choice(choice).save(tmp_path)
    again = ResolvedRun.load(tmp_path)
    assert again.evaluation.batch_frames == 2048
    assert again.recipe.evaluation.batch_frames == "auto"
    given = run_of("t5_small", "evaluation.batch_frames=100").with_choice(choice)
    assert given.evaluation.batch_frames == 100


@pytest.mark.parametrize("wrong", ["0", "-1", "2.5", "automatic", "true", "[4]", "null"])
def test_a_micro_batch_size_is_auto_or_a_number(wrong):
    error = error_of("t5_small", f"training.micro_batch_size={wrong}")
    assert "training.micro_batch_size" in error.message
