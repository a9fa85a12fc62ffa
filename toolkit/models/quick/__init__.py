"""Layers that train in less time on the CPU than torch's and transformers' own.

A step there spends time on random numbers that are drawn one by one, on copies in fp32, and on operations that each
read and write a whole tensor. ``benchmarks/training.py`` says what each layer gives. In evaluation, and on GPUs, models
compute as they always do.
"""
