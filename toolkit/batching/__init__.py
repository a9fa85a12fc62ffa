"""From a packed corpus to the batches of one rank: order, collation, loading.

This room knows lengths, clips and tokenizers. It does not know models, DeepSpeed or how a corpus came to be.
"""
