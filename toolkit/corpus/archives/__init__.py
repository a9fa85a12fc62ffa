"""The files of clips in a folder, a zip or a tar, whole or in parts, found by name; in bounded memory.

It must not know what the files hold, nor splits.
"""
