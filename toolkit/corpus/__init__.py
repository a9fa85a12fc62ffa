"""Many clips: tables and pose files become splits and a packed, memory-mapped corpus.

This room knows nothing of batches, models or training.
"""
