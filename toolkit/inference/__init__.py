"""Files, windows of long recordings and videos to text: what a user of a trained model calls, and the demo app.

Must not know training.
"""
