"""A training run: its start, its loop, its evaluations and its final scores.

Must not know launch scripts; the rooms below know nothing of it.
"""
