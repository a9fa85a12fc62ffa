"""Arithmetic on models and batches: what a run will need, before it starts.

Must not know how a model is trained or how a text is generated.
"""
