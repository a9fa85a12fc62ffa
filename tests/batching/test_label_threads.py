"""A tokenizer has one mode at a time, for all threads that read labels by it."""

import threading
import time

import pytest

from toolkit.batching.loader import evaluation_batches, train_batches


@pytest.mark.process
def test_a_tokenizer_reads_for_training_or_for_an_evaluation(corpus, resolve, tokenizer):
    """Its mode is that of one call, and on a GPU a thread labels the next batch of training."""

    class Watched:
        calls, most_at_once = 0, 0

        def __getattr__(self, name):
            return getattr(tokenizer, name)

        def __call__(self, *texts, **settings):
            self.calls += 1
            self.most_at_once = max(self.most_at_once, self.calls)
            time.sleep(0.002)
            self.calls -= 1
            return tokenizer(*texts, **settings)

    watched = Watched()
    split = corpus.splits["train"]
    training = train_batches(split, watched, resolve(micro=2), landmark_set=corpus.landmark_set)
    threads = [
        threading.Thread(target=list, args=[batches]) for batches in (training, evaluation_batches(split, watched, 50))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert watched.most_at_once == 1
