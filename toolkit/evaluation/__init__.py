"""Outputs and how good they are: generation, scores, floors, prediction files, and the tables and pages that show them.

This room knows models, batches and corpora. It does not know training or DeepSpeed's engine.
"""
