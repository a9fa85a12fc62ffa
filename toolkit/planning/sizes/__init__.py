"""Sizes of micro-batches: which there are, what the first epoch pads in them, and by the plan which fit and how fast.

Must not know ranks that run, nor rehearsals.
"""
