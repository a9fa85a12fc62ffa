"""Several corpora as one: their splits one after the other, each clip with what the recipe says of its corpus.

One corpus without such settings is itself. Must not know which clips an epoch draws (``batching/epochs.py``).
"""
