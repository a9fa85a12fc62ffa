"""Public corpora by name: how their tables differ from ours.

It must not know clips, shards or splits.
"""
