"""Evaluation of a model on the splits of a corpus: scores, floors, intervals and prediction files.

Must not know training, checkpoints or reports.
"""
