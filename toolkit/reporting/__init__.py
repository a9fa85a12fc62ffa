"""What people read about a run or a model: the HTML report with moving skeletons, and the model card.

Must not know training: it reads the files of a run directory.
"""
