"""Starting a run from a trained translator: what of it is taken, matched by landmark, part of the body and token.

Must not know training: a run asks for a plan and lets it fill a model.
"""
