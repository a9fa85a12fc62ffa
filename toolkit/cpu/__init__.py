"""Code of ranks on CPUs alone: layers, communication, allocator and shared memory, behind ``TOOLKIT_CPU_CODE``.

It must not know models, the meaning of recipes, or training.
"""
