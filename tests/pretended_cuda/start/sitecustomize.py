"""Begins each Python process of the pretended CUDA runtime: after torch is imported, its operators are replaced.

Python imports one module of this name, the first on its path; the next one, which this one hides, is run at the end.
"""

import importlib.abc
import importlib.machinery
import importlib.util
import os
import sys

HERE = os.path.dirname(os.path.abspath(__file__))


class _AfterTorch(importlib.abc.MetaPathFinder):
    """Finds torch as usual, once, and lets its import end with that of the operators."""

    def find_spec(self, name, path=None, target=None):
        if name != "torch":
            return None
        sys.meta_path.remove(self)
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_replace(module):
            execute(module)
            import pretended_operators

            pretended_operators.install()

        spec.loader.exec_module = execute_and_replace
        return spec


def _run_the_hidden_one():
    others = [folder for folder in sys.path if os.path.abspath(folder or ".") != HERE]
    spec = importlib.machinery.PathFinder.find_spec("sitecustomize", others)
    if spec is not None and spec.loader is not None:
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


if "libcudart" in os.environ.get("LD_PRELOAD", ""):
    sys.meta_path.insert(0, _AfterTorch())
_run_the_hidden_one()
