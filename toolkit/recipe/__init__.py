"""What the user asked for: recipes, model cards, DeepSpeed JSONs, and the one place that resolves them into a run.

This room imports no other room and none of torch, transformers and DeepSpeed, so that a recipe can be shown, checked
and refused in a fraction of a second. It holds the rules of what goes with what as data.
"""
