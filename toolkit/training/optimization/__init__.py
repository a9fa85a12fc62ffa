"""What decides how far each weight moves: parameter groups, schedules, freezing, averaging, the reduction of gradients.

Must not know the training loop.
"""
