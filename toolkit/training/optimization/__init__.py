"""How far each weight moves: parameter groups, schedules, freezing, averaging, gradient reduction.

Must not know the training loop.
"""
