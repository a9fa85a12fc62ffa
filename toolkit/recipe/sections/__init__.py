"""Parts of the schema of a recipe: what values its keys take, and the section that describes the model.

Must not know how a recipe is read.
"""
