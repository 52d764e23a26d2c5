"""The house: imports go to the left, in no circle, and each heavy dependency has one door.

All of it is computed from the imports, those inside functions and the root's too: a new file needs
no line here. A new wing needs one.
"""

import ast
import functools
import pathlib

import pytest

import ddim_jax

ROOT = pathlib.Path(ddim_jax.__file__).parent

# A file imports from its own wing and from those to its left; wings on one line never meet.
WINGS = [
    ["version"],
    ["arrays"],
    ["process"],
    ["sampling", "categorical", "networks"],
    ["storage", "data", "pictures"],
    ["weights"],
    ["generation", "evaluation"],
    ["training"],
    ["demo"],
    ["cli"],
    ["ddim_jax"],  # the root: it gives the public names
]
NEIGHBOURS = {("data", "pictures"), ("data", "storage"), ("pictures", "storage")}
NEVER = {("networks", "process")}  # a sampler is given its network as an argument
DOORS = {
    "datasets": {"data.hugging_face"},
    "diffrax": {"sampling.density"},
    "flatbuffers": {"generation.artifact"},
    "flax": {"networks.blocks", "networks.classifier", "networks.unet"},
    "grain": {"data.streams"},
    "huggingface_hub": {"weights.hub"},
    "matplotlib": {"pictures.plots"},
    "optax": {"training.step"},
    "orbax": {"storage.checkpoint"},
    "safetensors": {"storage.weights_file"},
    "sklearn": {"data.sets"},
    "tensorboardX": {"training.run_folder"},
    "tensorflow_datasets": {"data.tfds"},
    "wandb": {"training.watching"},
}


def name_of(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__") or "ddim_jax"


MODULES = {name_of(path): path for path in sorted(ROOT.rglob("*.py"))}


def wing(module):
    return module.split(".")[0]


@functools.cache  # each file is read once, not once for each door
def imports(path):
    """Dotted names of what a file imports, wherever in it; of `from a import b` both a and a.b."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [(alias.name, None) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path} uses a relative import"
            found += [(node.module, alias.name) for alias in node.names]
    return found


def ours(module):
    """The files that a file imports names from."""
    for source, name in imports(MODULES[module]):
        if source.split(".")[0] == "ddim_jax":
            short = source.removeprefix("ddim_jax").lstrip(".")
            whole = f"{short}.{name}".lstrip(".")
            found = next(m for m in (whole, short or "ddim_jax") if m in MODULES)
            if found != module:
                yield found


GRAPH = {module: set(ours(module)) for module in MODULES}


def test_there_is_no_circle():
    done, way = set(), []

    def visit(module):
        if module in way:
            raise AssertionError(" -> ".join([*way[way.index(module) :], module]))
        if module not in done:
            way.append(module)
            for other in sorted(GRAPH[module]):
                visit(other)
            done.add(way.pop())

    for module in GRAPH:
        visit(module)


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_to_the_left(module):
    place = {name: i for i, names in enumerate(WINGS) for name in names}
    assert wing(module) in place, f"{module} is in no wing: put {wing(module)} into WINGS"
    for other in GRAPH[module]:
        a, b = wing(module), wing(other)
        meet = a == b or place[b] < place[a] or (a, b) in NEIGHBOURS
        assert meet, f"{module} imports {other}"
        assert (a, b) not in NEVER


@pytest.mark.parametrize(("package", "doors"), DOORS.items())
def test_one_door(package, doors):
    users = {m for m, p in MODULES.items() if package in {s.split(".")[0] for s, _ in imports(p)}}
    assert users == doors


def test_only_the_command_reads_the_command_line():
    users = {m for m, p in MODULES.items() if "tyro" in {s.split(".")[0] for s, _ in imports(p)}}
    assert {wing(m) for m in users} == {"cli"}


def test_sampling_alone_needs_no_network_and_no_training():
    """What `import ddim_jax` loads, by the imports at the top of files."""
    import subprocess
    import sys

    code = "import sys, ddim_jax; print(*sorted(sys.modules))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout
    assert "ddim_jax.sampling.sampler" in loaded
    assert not set(loaded.split()) & {"flax", "optax", "orbax", "grain", "tyro", "matplotlib"}
