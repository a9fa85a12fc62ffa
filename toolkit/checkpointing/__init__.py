"""What a run saves and how it is loaded again, on other ranks and ZeRO stages; the models kept by score.

Must not know the training loop.
"""
