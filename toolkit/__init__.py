"""Train sign language translators: pose sequences in, text out, on DeepSpeed.

After ``import toolkit``, ``AutoModel`` and ``AutoProcessor`` of transformers load a saved translator. Importing
transformers takes seconds, which commands that do not need it should not pay; so the translator is registered at the
moment when one of the ``Auto`` classes is first asked for, in whichever order the two packages are imported.
"""

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

__version__ = "0.1.0"


class _RegistersTranslator(importlib.abc.MetaPathFinder):
    """Waits for the import of transformers, once."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != "transformers":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                _register_on_demand(sys.modules[fullname])

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def _register_on_demand(transformers: ModuleType) -> None:
    """Make ``transformers.AutoModel`` and its like register the translator before they are handed out.

    transformers looks its public names up when they are first used; only that look-up is extended. Its own modules
    import each other by other ways, so nothing happens while they are half imported.
    """
    lazy: Any = type(transformers)

    class WithTranslator(lazy):
        def __getattr__(self, name: str) -> Any:
            value = super().__getattr__(name)
            if name.startswith("Auto"):
                importlib.import_module("toolkit.models")
            return value

    WithTranslator.__name__ = lazy.__name__
    transformers.__class__ = WithTranslator


if "transformers" not in sys.modules:
    sys.meta_path.insert(0, _RegistersTranslator())
elif any(name.startswith("transformers.models.auto.") for name in sys.modules):
    importlib.import_module("toolkit.models")
else:
    _register_on_demand(sys.modules["transformers"])
