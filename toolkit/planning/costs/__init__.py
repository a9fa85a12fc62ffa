"""What the parts of a run cost: weights by kind, what DeepSpeed allocates for them, and traced passes.

Must not know hardware, plans or tables.
"""
