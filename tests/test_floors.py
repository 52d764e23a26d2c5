"""The house rules: imports point down, and each heavy dependency has one door."""

import ast
import pathlib

import pytest

import ddim_jax

ROOT = pathlib.Path(ddim_jax.__file__).parent

FLOORS = [
    {"_types", "_files", "_digest", "flops"},
    {
        "schedule",
        "timesteps",
        "process",
        "_categorical",
        "categorical",
        "_conv",
        "_unet_config",
        "unet",
        "images",
        "clipping",
    },
    {
        "sampling",
        "inversion",
        "latents",
        "multistep",
        "tau_search",
        "guidance",
        "objective",
        "oracle",
    },
    {
        "weights",
        "torch_files",
        "diffusers_config",
        "diffusers_format",
        "state_dict",
        "checkpoint",
        "_tfds",
        "data",
        "parallel",
        "training",
        "run_folder",
        "loop",
        "summary",
        "presets",
        "pretrained",
        "generate",
        "evaluation",
    },
    {"plots", "demo", "cli"},
]
DOORS = {
    "optax": {"training"},
    "orbax": {"checkpoint"},
    "tensorflow_datasets": {"_tfds"},
    "grain": {"data"},
    "sklearn": {"data"},
    "tensorboardX": {"run_folder"},
    "flax": {"unet"},
    "safetensors": {"weights"},
    "tyro": {"cli"},
    "matplotlib": {"plots"},
}
NEVER_MEET = [("process", "unet"), ("sampling", "unet"), ("unet", "schedule")]


def modules():
    for path in sorted(ROOT.rglob("*.py")):
        name = path.relative_to(ROOT).parts[0].removesuffix(".py")
        if name != "__init__":
            yield name, path


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path} uses a relative import"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def ours(path):
    for name in imports(path):
        parts = name.split(".")
        if (
            parts[0] == "ddim_jax"
            and len(parts) > 1
            and (ROOT / parts[1]).exists() | (ROOT / f"{parts[1]}.py").exists()
        ):
            yield parts[1]


def floor(name):
    found = [i for i, names in enumerate(FLOORS) if name in names]
    assert len(found) == 1, f"{name} has no floor: put it into FLOORS"
    return found[0]


@pytest.mark.parametrize(("name", "path"), list(modules()), ids=lambda v: str(v).split("/")[-1])
def test_imports_come_from_no_higher_floor(name, path):
    for other in ours(path):
        assert floor(other) <= floor(name), f"{name} (floor {floor(name)}) imports {other}"
        assert (name, other) not in NEVER_MEET
        assert (other, name) not in NEVER_MEET


@pytest.mark.parametrize(("package", "doors"), DOORS.items())
def test_one_door(package, doors):
    users = {
        name for name, path in modules() if package in {i.split(".")[0] for i in imports(path)}
    }
    assert users == doors
