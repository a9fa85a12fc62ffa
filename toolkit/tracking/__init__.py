"""What a run tells the world while it trains: figures in files and trackers, and one line on the terminal.

This room knows steps and named numbers, nothing of models, data or DeepSpeed.
"""
