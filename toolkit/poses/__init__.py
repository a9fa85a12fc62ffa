"""One clip: the bytes of a pose file become named landmarks, and these become features.

This room knows nothing of tables, splits, batches or models.
"""
