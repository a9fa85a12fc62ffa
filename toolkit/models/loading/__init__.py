"""Weights from the hub, a folder or a random generator into a model, in the run's dtype, device and partition.

Must not know training.
"""
