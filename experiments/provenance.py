"""Where numbers come from: weights, data, device and versions; and files that appear whole."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import pathlib
import platform
import re
from collections.abc import Mapping
from typing import Any

import jax
import jaxlib
import numpy as np

import ddim_jax as ddim
from ddim_jax.storage.files import write_whole as write
from ddim_jax.training.presets import PRESETS, DataConfig, learned_from


def digest(model: ddim.Model) -> dict[str, Any]:
    """Which weights these are."""
    what = [model.config.facts(), model.prediction.kind]
    sha = hashlib.sha256(json.dumps(what).encode())
    sha.update(np.asarray(model.schedule.log_alpha_bar).tobytes())
    for path, leaf in jax.tree_util.tree_leaves_with_path(model.params):
        sha.update(f"{jax.tree_util.keystr(path)} {leaf.shape}".encode())
        sha.update(np.ascontiguousarray(leaf, "<f4").tobytes())
    return {"sha256": sha.hexdigest(), "preset": model.facts.get("preset")}


def device() -> dict[str, Any]:
    """What computes here."""
    first = jax.local_devices()[0]
    model = platform.processor() or platform.machine()
    try:
        info = pathlib.Path("/proc/cpuinfo").read_text()
        model = (re.search(r"model name\s*: (.*)", info) or [model, model])[1]
    except OSError:
        pass
    return {
        "platform": first.platform,
        "kind": first.device_kind,
        "count": len(jax.local_devices()),
        "cpu": model,
        "cores": os.cpu_count(),
    }


def versions(*more: str) -> dict[str, str]:
    """Of what the numbers depend on, and of `more` packages where they are installed."""
    found = {
        "python": platform.python_version(),
        "ddim_jax": ddim.__version__,
        "jax": jax.__version__,
        "jaxlib": jaxlib.__version__,
        "numpy": np.__version__,
    }
    return found | {p: importlib.metadata.version(p) for p in more if importlib.util.find_spec(p)}


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """What `write_json` wrote; ValueError where the file is damaged."""
    try:
        found = json.loads(path.read_text())
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise ValueError(f"{path} is damaged: move it away, and what it held is computed again")
    return found


def write_json(path: pathlib.Path, value: Any) -> None:
    """JSON that appears whole or not at all; NaN is an error."""
    write(path, (json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode())


def data_config(name: str | None, facts: Mapping[str, Any]) -> DataConfig:
    """The data called `name` with the preset's cropping, or those in the model's facts."""
    if name is None and (own := learned_from(facts)):
        return own
    if name is None:
        raise ValueError("the model does not say what it learned from: name the data with --data")
    presets = {key: preset().data for key, preset in PRESETS.items()}
    known = {data.name: data for data in presets.values()} | presets
    plain = name.split(":")[0]
    if plain.startswith("lsun/"):
        return dataclasses.replace(presets["lsun256"], name=name)
    if plain not in known:
        return DataConfig(name)
    data = known[plain]
    return dataclasses.replace(data, name=name) if plain == data.name else data
