"""Trimming a vocabulary to the texts of a corpus (``model.vocabulary: corpus``): its tokenizer, its rows, and back.

Must not know training: a run asks for a tokenizer, and the code that loads weights for the rows that it has.
"""
