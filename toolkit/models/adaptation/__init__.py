"""LoRA, quantisation, extra tokens; files of what trained, merging and exporting.

Must not know training.
"""
