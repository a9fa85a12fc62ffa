"""The stream of batches is the same for any number of workers and ranks, can be resumed, and leaves no process."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
import traceback
import warnings
from pathlib import Path

import pytest
import torch

from tests.time_limits import limit
from toolkit.batching.collate import IGNORED_LABEL, Batch
from toolkit.batching.lengths import text_sizes
from toolkit.batching.loader import evaluation_batches, train_batches
from toolkit.batching.order import steps_per_epoch

REPOSITORY = Path(__file__).parents[2]
ALL_ON = {
    "rotation": 10, "scale": 0.2, "shear": 0.1, "translation": 0.1, "noise": 0.02, "speed": 0.3, "time_warp": 0.3,
    "frame_drop": 0.1, "landmark_drop": 0.1, "hand_drop": 0.5, "mirror": 0.5, "temporal_crop": 0.1,
}  # fmt: skip


@pytest.mark.process
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_prefixes_are_of_their_clips_and_drop_the_same_words_wherever_they_are_read(
    known_corpus, tokenizer, resolve, dropout: float
) -> None:
    model = {"backbone": "t5_small", "prefix": "{language} {context}", "condition_dropout": dropout}

    def prefixes(*, micro: int, epoch: int = 0, workers: int = 0) -> dict[int, str]:
        resolved = resolve(micro=micro, accumulation=12 // micro, model=model, training={"workers": workers})
        stream = train_batches(
            known_corpus.splits["train"], tokenizer, resolved, landmark_set=known_corpus.landmark_set, epoch=epoch
        )
        read = {}
        for batch in (batch for step in stream for batch in step):
            for clip, ids in zip(batch.clips.tolist(), batch.prefix_ids, strict=True):
                read[clip] = tokenizer.decode(ids[ids >= 0])
        return read

    whole = {clip: f"language{clip} context{clip}" for clip in range(45)}
    first = prefixes(micro=4)
    assert first == prefixes(micro=6, workers=1)
    if not dropout:
        assert first == whole
    else:
        left_out = sum(len(whole[clip].split()) - len(first[clip].split()) for clip in whole)
        assert 25 <= left_out <= 65  # of 90; both words or either
        assert first != prefixes(micro=4, epoch=1)
        assert set(" ".join(first.values()).split()) < set(" ".join(whole.values()).split())


def assert_same(first: Batch, second: Batch) -> None:
    assert first.uids == second.uids
    for name in ("poses", "visible", "frame_mask", "labels", "is_filler", "clips"):
        assert torch.equal(getattr(first, name), getattr(second, name)), name


def by_clip(steps: list[list[Batch]]) -> dict[str, torch.Tensor]:
    """What the model gets to see of each clip, without padding."""
    seen = {}
    for batch in (batch for step in steps for batch in step):
        for row, uid in enumerate(batch.uids):
            if not batch.is_filler[row]:
                assert uid not in seen
                seen[uid] = batch.poses[row, batch.frame_mask[row]]
    return seen


def test_an_epoch_holds_every_clip_once_in_steps_of_equal_shape(corpus, resolve, train):
    resolved = resolve()
    steps = train(resolved)
    assert len(steps) == steps_per_epoch(len(corpus.splits["train"]), 8)
    assert all(len(step) == resolved.accumulation_steps for step in steps)
    assert sorted(by_clip(steps)) == list(corpus.splits["train"].uids)


def test_features_are_those_of_the_corpus(corpus, resolve, train):
    split = corpus.splits["train"]
    for uid, poses in by_clip(train(resolve())).items():
        features = torch.from_numpy(split.clip(list(split.uids).index(uid)).features.copy()).float()
        assert torch.equal(poses, features.nan_to_num(0.0))


@pytest.mark.process
@pytest.mark.parametrize("epoch", [0, 3])
def test_workers_change_nothing(resolve, train, epoch):
    plain, with_workers = (
        train(resolve(training={"workers": workers}, augmentation=ALL_ON), epoch=epoch) for workers in (0, 2)
    )
    for first, second in zip(plain, with_workers, strict=True):
        for one, other in zip(first, second, strict=True):
            assert_same(one, other)


def test_texts_count_where_they_share_a_sequence_with_their_clips(corpus, resolve):
    texts = corpus.splits["train"].texts
    for backbone in ("qwen3_0_6b", "Qwen/Qwen2.5-7B"):
        sizes = text_sizes(texts, resolve(model={"backbone": backbone}).recipe)
        assert sizes.tolist() == [len(text.encode()) for text in texts]
    for backbone in ("t5_small", "facebook/bart-base"):
        assert text_sizes(texts, resolve(model={"backbone": backbone}).recipe) is None


def test_resuming_gives_what_the_whole_epoch_gave(resolve, train):
    resolved = resolve(augmentation=ALL_ON)
    whole, resumed = train(resolved, epoch=1), train(resolved, epoch=1, start_step=4)
    assert len(resumed) == len(whole) - 4 > 0
    for first, second in zip(whole[4:], resumed, strict=True):
        for one, other in zip(first, second, strict=True):
            assert_same(one, other)


@pytest.mark.parametrize(("world_size", "limit"), [(1, 2), (2, 4), (4, 1), (8, 1), (3, 2), (5, 4), (6, 1)])
def test_the_clips_of_each_step_and_their_augmentation_do_not_depend_on_the_split_over_ranks(
    resolve, train, world_size, limit
):
    alone = train(resolve(1, 4, 2, augmentation=ALL_ON))
    settings = {"global_batch_size": 8, "micro_batch_size": limit}
    resolved = resolve(world_size, training=settings, augmentation=ALL_ON)
    ranks = [train(resolved, rank=rank) for rank in range(world_size)]
    assert {len(steps) for steps in ranks} == {len(alone)}
    for index, step in enumerate(alone):
        together = by_clip([steps[index] for steps in ranks])
        expected = by_clip([step])
        assert together.keys() == expected.keys()
        assert all(torch.equal(together[uid], expected[uid]) for uid in expected)


@pytest.mark.parametrize("world_size", [1, 3])
def test_a_frame_budget_keeps_the_global_batches(resolve, train, world_size):
    alone = train(resolve(1, 8, 1, augmentation=ALL_ON))
    settings = {"global_batch_size": 8, "micro_batch_frames": 60}
    resolved = resolve(world_size, 8, 1, training=settings, augmentation=ALL_ON)
    ranks = [train(resolved, rank=rank) for rank in range(world_size)]
    for index, step in enumerate(alone):
        together = by_clip([steps[index] for steps in ranks])
        expected = by_clip([step])
        assert together.keys() == expected.keys()
        assert all(torch.equal(together[uid], expected[uid]) for uid in expected)
    for number in range(len(alone)):
        assert len({len(steps[number]) for steps in ranks}) == 1
    batches = [batch for steps in ranks for step in steps for batch in step]
    assert all(len(batch) == 1 or batch.frame_mask.numel() <= 60 for batch in batches)
    resumed = train(resolved, start_step=3)
    assert [len(step) for step in resumed] == [len(step) for step in ranks[0][3:]]


def test_fillers_of_the_last_step_carry_no_labels(resolve, train):
    # 45 clips in steps of 8 leave 5: three of eight ranks get a filler.
    ranks = [train(resolve(8, 1, 1), rank=rank) for rank in range(8)]
    fillers = [steps[-1][0] for steps in ranks if steps[-1][0].is_filler.any()]
    assert len(fillers) == 3
    assert all((batch.labels == IGNORED_LABEL).all() and batch.num_frames == 0 for batch in fillers)
    assert not any(batch.is_filler.any() for steps in ranks for step in steps[:-1] for batch in step)


def test_augmentation_differs_from_epoch_to_epoch(resolve, train):
    resolved = resolve(augmentation={"rotation": 10})
    first, second = by_clip(train(resolved, epoch=0)), by_clip(train(resolved, epoch=1))
    assert not any(torch.equal(first[uid], second[uid]) for uid in first)


def test_a_changed_speed_costs_no_padding(resolve, train):
    def padding(steps: list[list[Batch]]) -> float:
        batches = [batch for step in steps for batch in step]
        frames = sum(batch.frame_mask.numel() for batch in batches)
        return 1 - sum(batch.num_frames for batch in batches) / frames

    plain = padding(train(resolve()))
    augmented = padding(train(resolve(augmentation={"speed": 0.5, "temporal_crop": 0.3, "frame_drop": 0.2})))
    assert augmented < plain + 0.03


def test_slowed_clips_stay_within_the_longest_length(resolve, train):
    steps = train(resolve(data={"max_frames": 60}, augmentation={"speed": 1.0}))
    assert max(batch.poses.shape[1] for step in steps for batch in step) == 60
    assert all(batch.num_frames == batch.frame_mask.sum() for step in steps for batch in step)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_evaluation_gives_each_clip_once_over_all_ranks(corpus, tokenizer, world_size):
    split = corpus.splits["train"]
    ranks = [
        list(evaluation_batches(split, tokenizer, 120, rank=rank, world_size=world_size)) for rank in range(world_size)
    ]
    assert len({len(batches) for batches in ranks}) == 1
    batches = [batch for batches in ranks for batch in batches]
    seen = [uid for batch in batches for uid, filler in zip(batch.uids, batch.is_filler, strict=True) if not filler]
    assert sorted(seen) == list(split.uids)
    assert all(batch.frame_mask.numel() <= 120 or len(batch) == 1 for batch in batches)


class BrokenTokenizer:
    def __call__(self, text_target, **_):
        raise ValueError(f"cannot tokenise {len(text_target)} texts")


@pytest.mark.process
@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_of_the_tokenizer_names_the_clips(corpus, resolve, workers):
    resolved = resolve(training={"workers": workers})
    stream = train_batches(corpus.splits["train"], BrokenTokenizer(), resolved, landmark_set=corpus.landmark_set)
    with pytest.raises(ValueError, match="cannot tokenise 4 texts") as error:
        next(stream)
    stream.close()
    report = "".join(traceback.format_exception(error.value))
    assert re.search(r"in a batch of these clips: clip\d{3}, clip\d{3}, clip\d{3}, clip\d{3}", report)


@pytest.mark.process
@pytest.mark.parametrize("workers", [0, 2])
def test_an_exception_in_a_worker_reaches_the_caller_with_its_message_and_the_clips(
    corpus, resolve, tokenizer, monkeypatch, workers
):
    def broken(*_):
        raise ValueError("rotation")

    monkeypatch.setattr("toolkit.batching.loader.augment", broken)
    resolved = resolve(training={"workers": workers}, augmentation=ALL_ON)
    stream = train_batches(corpus.splits["train"], tokenizer, resolved, landmark_set=corpus.landmark_set)
    with pytest.raises(ValueError, match="rotation") as error:
        next(stream)
    stream.close()
    report = "".join(traceback.format_exception(error.value))
    assert re.search(r"in a batch of these clips: clip\d{3}, clip\d{3}, clip\d{3}, clip\d{3}", report)
    assert report.count("ValueError: rotation") == 1


def test_clips_that_cannot_be_read_are_named(corpus, resolve, tokenizer, monkeypatch):
    def broken(indices):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(corpus.splits["train"], "read", broken)
    stream = train_batches(corpus.splits["train"], tokenizer, resolve(), landmark_set=corpus.landmark_set)
    with pytest.raises(OSError, match="Input/output") as error:
        next(stream)
    assert re.search(r"while these clips of split train were read: \d+, \d+", error.value.__notes__[0])


def children_of(pid: int) -> set[int]:
    return {int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()}


def wait_until(condition, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.05)
    return condition()


@pytest.mark.process
@pytest.mark.parametrize("workers", [0, 1, 3])
def test_epochs_follow_each_other_in_the_same_workers(corpus, resolve, tokenizer, train, workers):
    resolved = resolve(training={"workers": workers}, augmentation=ALL_ON)
    before = children_of(os.getpid())
    stream = train_batches(
        corpus.splits["train"],
        tokenizer,
        resolved,
        landmark_set=corpus.landmark_set,
        epoch=1,
        start_step=4,
        epochs=None,
    )
    started = children_of(os.getpid()) - before
    assert len(started) == workers
    plain = resolve(augmentation=ALL_ON)
    for expected in [*train(plain, epoch=1, start_step=4), *train(plain, epoch=2), *train(plain, epoch=3)]:
        for one, other in zip(expected, next(stream), strict=True):
            assert_same(one, other)
        assert children_of(os.getpid()) - before == started
    stream.close()
    assert wait_until(lambda: not any(_is_alive(pid) for pid in started), 10)


def test_a_run_that_resumes_at_the_end_of_an_epoch_begins_the_next_one(corpus, resolve, tokenizer, train):
    resolved = resolve()
    done = steps_per_epoch(len(corpus.splits["train"]), 8)
    stream = train_batches(
        corpus.splits["train"], tokenizer, resolved, landmark_set=corpus.landmark_set, start_step=done, epochs=None
    )
    for one, other in zip(train(resolved, epoch=1)[0], next(stream), strict=True):
        assert_same(one, other)


@pytest.mark.process
def test_a_tokenizer_may_come_after_the_workers_have_started(corpus, resolve, tokenizer, train):
    resolved = resolve(training={"workers": 2})
    stream = train_batches(corpus.splits["train"], None, resolved, landmark_set=corpus.landmark_set, epochs=None)
    stream.set_tokenizer(tokenizer)
    for expected in [*train(resolve(), epoch=0), *train(resolve(), epoch=1)]:
        for one, other in zip(expected, next(stream), strict=True):
            assert_same(one, other)
    stream.close()


def test_more_workers_than_cores_give_no_warning(corpus, resolve, tokenizer):
    resolved = resolve(training={"workers": 2 * len(os.sched_getaffinity(0)) + 1})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        stream = train_batches(corpus.splits["train"], tokenizer, resolved, landmark_set=corpus.landmark_set)
    next(stream)
    stream.close()


@pytest.mark.process
def test_a_gpu_gets_its_batches_in_page_locked_memory(corpus, resolve, tokenizer, train, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    pinned = []
    monkeypatch.setattr(Batch, "pin_memory", lambda batch: (pinned.append(batch), batch)[1])
    steps = train(resolve(training={"workers": 2}))
    assert pinned == [batch for step in steps for batch in step]


SCRIPT = """
    import signal, sys, time
    from pathlib import Path
    from transformers import ByT5Tokenizer
    from toolkit.batching.loader import train_batches
    from toolkit.corpus.packed import Corpus
    from toolkit.recipe.resolve import ResolvedRun
    from toolkit.recipe.schema import Recipe

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, lambda *_: print("asked to stop", flush=True))
    corpus = Corpus.open(sys.argv[1])
    training = {"global_batch_size": 2, "micro_batch_size": 2, "workers": 2}
    recipe = Recipe.model_validate({"name": "test", "model": {"backbone": "t5_small"}, "training": training})
    stream = train_batches(
        corpus.splits["train"], ByT5Tokenizer(), ResolvedRun(recipe, {}, 1, 2, 1, Path("unused")),
        landmark_set=corpus.landmark_set,
    )
    next(stream)
    print("started", flush=True)
    for line in sys.stdin:
        print(len(list(stream)), "more batches", flush=True)
"""


@pytest.mark.process
def test_a_process_can_end_within_an_epoch(corpus):
    script = textwrap.dedent(SCRIPT).replace("for line in sys.stdin", "for line in []")
    subprocess.run([sys.executable, "-c", script, str(corpus.path)], cwd=REPOSITORY, check=True, timeout=limit(60))


@pytest.fixture(params=["corpus"])
def loading_process(request):
    """A process, leader of its own group, that has loaded a first batch with two workers."""
    corpus = request.getfixturevalue(request.param)
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(SCRIPT), str(corpus.path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
        cwd=REPOSITORY,
    )
    assert process.stdout.readline() == "started\n"
    yield process
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # with its workers, if they are still alive
    process.communicate()


@pytest.mark.process
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_workers_survive_a_request_to_stop_that_their_parent_handles(loading_process, number):
    os.killpg(loading_process.pid, number)
    assert loading_process.stdout.readline() == "asked to stop\n"
    loading_process.stdin.write("continue\n")
    loading_process.stdin.flush()
    assert loading_process.stdout.readline().endswith("more batches\n")


# A worker that waits for its parent to read from a full pipe must end, too.
@pytest.mark.process
@pytest.mark.parametrize("loading_process", ["corpus", "wordy_corpus"], indirect=True)
def test_workers_do_not_outlive_a_parent_that_was_killed(loading_process):
    workers = children_of(loading_process.pid)
    assert len(workers) == 2
    loading_process.kill()
    assert wait_until(lambda: not any(_is_alive(pid) for pid in workers), 20)


def _is_alive(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
