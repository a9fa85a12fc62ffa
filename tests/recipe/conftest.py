"""Hypothesis for this room: a busy machine makes an example slow, not wrong."""

from hypothesis import settings

settings.register_profile("recipe", deadline=None, max_examples=100)
settings.load_profile("recipe")
