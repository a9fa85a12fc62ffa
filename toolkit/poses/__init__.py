"""Turn the bytes of one pose file into named landmarks, and these into features; augment features.

It must not know tables, splits, batches or models.
"""
