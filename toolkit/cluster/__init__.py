"""The machine under a run: ranks, versions, compiled ops, shared memory, and what works here.

It must not know models, data or training; it imports DeepSpeed inside functions, so that wrong input is refused early.
"""
