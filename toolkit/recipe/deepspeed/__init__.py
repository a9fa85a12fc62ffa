"""Knowledge about DeepSpeed's JSON: its keys, what they mean, and what goes with what.

Must not know how a recipe is read.
"""
