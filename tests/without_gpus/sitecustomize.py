"""Hides the GPUs from a Python process, whatever its launcher has set; ``tests/hidden_gpus.py`` says why."""

import os

os.environ["CUDA_VISIBLE_DEVICES"] = ""
