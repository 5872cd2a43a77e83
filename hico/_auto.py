"""Make the Auto classes of transformers know hico's, without loading torch for ``import hico``.

transformers offers no hook for packages, and registering at once would import torch and half of transformers. So we
wait for the modules that hold the Auto classes, and register as soon as they are loaded.
"""

import importlib
import importlib.abc
import importlib.util
import sys

_AUTO = "transformers.models.auto"


def _register_config() -> None:
    from transformers import AutoConfig

    from hico.configuration_hico import HicoConfig

    AutoConfig.register(HicoConfig.model_type, HicoConfig, exist_ok=True)


def _register_models() -> None:
    from transformers import AutoModel, AutoModelForImageTextToText

    from hico.modeling_hico import HicoConfig, HicoForConditionalGeneration, HicoModel

    AutoModel.register(HicoConfig, HicoModel, exist_ok=True)
    AutoModelForImageTextToText.register(HicoConfig, HicoForConditionalGeneration, exist_ok=True)


def _register_processor() -> None:
    from transformers import AutoProcessor

    from hico.processing_hico import HicoConfig, HicoProcessor

    AutoProcessor.register(HicoConfig, HicoProcessor, exist_ok=True)


_REGISTER = {
    f"{_AUTO}.configuration_auto": _register_config,
    f"{_AUTO}.modeling_auto": _register_models,
    f"{_AUTO}.processing_auto": _register_processor,
}


class _Watcher(importlib.abc.MetaPathFinder):
    """Lets other finders find the modules, and registers after they ran."""

    def find_spec(self, name, path=None, target=None):
        if name not in _REGISTER or name in _pending:
            return None
        _pending.add(name)
        try:
            spec = importlib.util.find_spec(name)
        finally:
            _pending.discard(name)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def run_and_register(module):
                run(module)
                _REGISTER[name]()

            spec.loader.exec_module = run_and_register
        return spec


_pending: set[str] = set()


def register_when_loaded() -> None:
    """Register now with the Auto classes that are loaded, and later with those that are not."""
    sys.meta_path.insert(0, _Watcher())
    for name, register in _REGISTER.items():
        if name in sys.modules:
            register()
