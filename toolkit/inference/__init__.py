"""Translation of clips with a saved model: files and archives, long recordings, subtitles and the demo app.

Must not know training, checkpoints or evaluation.
"""
