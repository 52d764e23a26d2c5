"""Training: the step, the loop, the run folder, presets. Its names are imported when asked for."""

import importlib
from typing import Any

_WHERE = {
    "PRESETS": "presets",
    "DataConfig": "presets",
    "Preset": "presets",
    "TrainConfig": "config",
    "TrainState": "step",
    "distill": "distilling",
    "fit": "loop",
    "init_state": "step",
    "make_mesh": "parallel",
    "make_optimizer": "step",
    "make_train_step": "step",
    "read_metrics": "run_folder",
}
__all__ = list(_WHERE)


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_WHERE[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
