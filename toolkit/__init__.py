"""Train sign language translators: pose sequences in, text out, on DeepSpeed."""

__version__ = "0.1.0"
