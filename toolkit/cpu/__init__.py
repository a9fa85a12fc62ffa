"""What only ranks on CPUs use: layers in fewer passes, communication in place, the allocator, shared memory.

Must not know models, recipes' meaning or training.
"""
