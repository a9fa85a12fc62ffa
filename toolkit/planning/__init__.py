"""What a run will need, told before it is needed.

This room does arithmetic on models and batches; it trains nothing and generates nothing.
"""
