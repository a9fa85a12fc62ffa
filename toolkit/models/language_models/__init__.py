"""Language models as backbones: clips are a prefix of vectors, which the text follows; prompts and chat templates.

Must not know training.
"""
