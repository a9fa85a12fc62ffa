"""What changes a backbone: LoRA, quantisation, extra tokens; merging and exporting what was trained.

Must not know training.
"""
