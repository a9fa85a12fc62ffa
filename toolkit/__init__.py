"""Train sign language translators: pose sequences in, text out, on DeepSpeed. Imports nothing; see ``toolkit.auto``."""

__version__ = "0.1.0"
