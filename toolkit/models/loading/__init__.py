"""Weights from the hub, a folder or random numbers into a model, in the form that the run holds them.

Must not know training.
"""
