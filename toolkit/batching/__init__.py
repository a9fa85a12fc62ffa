"""Turn a packed corpus into the batches of one rank: order, collation, loading.

It must not know DeepSpeed, or how a corpus is prepared.
"""
