"""Turn the bytes of one clip's files into named landmarks and features of other networks; sample and augment both.

It must not know tables, splits, batches or models.
"""
