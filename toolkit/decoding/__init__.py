"""From a model and clips to hypotheses: beam search, and a split decoded over all ranks.

Must not know runs, checkpoints or scores.
"""
