"""Turn tables and pose files into splits and a packed, memory-mapped corpus.

It must not know batches, models or training.
"""
