"""Backbones of which transformers builds something else than was published, or more than poses and texts need.

Must not know of poses.
"""
