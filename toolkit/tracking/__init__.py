"""The figures of a run while it trains: ``metrics.jsonl``, trackers (W&B, TensorBoard) and the line on the terminal.

Must not know models, data or DeepSpeed: it gets steps and named numbers.
"""
