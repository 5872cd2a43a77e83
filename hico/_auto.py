"""Make the Auto classes of transformers know hico's, without loading torch for ``import hico``.

transformers offers packages no hook, and registering at once would import torch and half of transformers. So we wait
for the modules that hold the Auto classes, and then import those of ours that register themselves.
"""

import importlib.abc
import importlib.util
import sys

_WAITING = {
    "transformers.models.auto.configuration_auto": "hico.configuration_hico",
    "transformers.models.auto.modeling_auto": "hico.modeling_hico",
    "transformers.models.auto.processing_auto": "hico.processing_hico",
}


class _Watcher(importlib.abc.MetaPathFinder):
    """Let other finders find the modules; act after they ran."""

    def __init__(self):
        self._finding: set[str] = set()

    def find_spec(self, name, path=None, target=None):
        if name not in _WAITING or name in self._finding:
            return None
        self._finding.add(name)
        try:
            spec = importlib.util.find_spec(name)
        finally:
            self._finding.discard(name)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def run_and_register(module):
                run(module)
                importlib.import_module(_WAITING[name])

            spec.loader.exec_module = run_and_register
        return spec


def register_when_loaded() -> None:
    """Register now with the Auto classes that are loaded, and later with those that are not."""
    sys.meta_path.insert(0, _Watcher())
    for name, ours in _WAITING.items():
        if name in sys.modules:
            importlib.import_module(ours)
