"""Recipes, model cards and DeepSpeed JSONs as data: read, checked, and resolved into a run.

Must not know any other room, nor torch, transformers and DeepSpeed.
"""
