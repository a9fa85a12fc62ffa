"""Fitting a run to the hardware it is on: its micro-batches by a rehearsal, its DeepSpeed JSON by a plan.

Must not know launch scripts; the rooms below know nothing of it.
"""
