"""The machine under a run: ranks, versions, compiled ops, shared memory, and what works here.

This room knows nothing of models, data or training; it imports torch and DeepSpeed only inside the functions that need
them, so that a command can be refused, or the environment described, before seconds are spent on imports.
"""
