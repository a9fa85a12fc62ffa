"""Begins each Python process of the pretended CUDA runtime: an import of torch ends with that of the operators.

So does one of bitsandbytes.

Python imports one module of this name, the first on its path; the next one, which this one hides, is run at the end.
"""

import importlib.abc
import importlib.machinery
import importlib.util
import os
import sys

HERE = os.path.dirname(os.path.abspath(__file__))


class _AndThen(importlib.abc.MetaPathFinder):
    """Finds a module as usual, once, and lets its import end with a function of pretended_operators."""

    def __init__(self, module, function):
        self.module, self.function = module, function

    def find_spec(self, name, path=None, target=None):
        if name != self.module:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_replace(module):
            sys.meta_path.remove(self)  # not before: who asks whether torch is there gets a spec, too
            execute(module)
            import pretended_operators

            getattr(pretended_operators, self.function)()

        spec.loader.exec_module = execute_and_replace
        return spec


def _run_the_hidden_one():
    others = [folder for folder in sys.path if os.path.abspath(folder or ".") != HERE]
    spec = importlib.machinery.PathFinder.find_spec("sitecustomize", others)
    if spec is not None and spec.loader is not None:
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


if "libcudart" in os.environ.get("LD_PRELOAD", ""):
    sys.meta_path.insert(0, _AndThen("torch", "install"))
    sys.meta_path.insert(0, _AndThen("bitsandbytes", "install_quantisation"))
_run_the_hidden_one()
