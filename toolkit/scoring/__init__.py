"""Scores of texts: metrics, confidence intervals, floors, prediction files and tables.

Must not know torch, models or how the texts were made.
"""
