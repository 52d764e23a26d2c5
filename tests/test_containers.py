"""State dicts wherever programs put them: containers, variants, shards; and what is refused."""

import json
import warnings
from collections import OrderedDict

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from ddim_jax.networks import unet
from ddim_jax.process import ScheduleConfig
from ddim_jax.weights import load_model
from ddim_jax.weights.containers import find_state
from ddim_jax.weights.diffusers_config import unet_settings
from ddim_jax.weights.diffusers_format import diffusers_name
from ddim_jax.weights.state_dict import from_state_dict, to_state_dict
from ddim_jax.weights.torch_files import load_torch
from tests import pseudo_weights, torch_writer
from tests.tiny import UNET as TINY
from tests.tiny import assert_same


def by_diffusers(state):
    """Their names, and attention as linear layers."""
    named = {diffusers_name(name, TINY): array for name, array in state.items()}
    return {
        name: array[:, :, 0, 0] if ".to_" in name and array.ndim == 4 else array
        for name, array in named.items()
    }


STEM = "diffusion_pytorch_model"
SIZED = {"image_size": 8, "schedule": ScheduleConfig()}
BLANK = jax.tree.map(lambda leaf: np.zeros(leaf.shape), unet.abstract_params(TINY))
STATE = pseudo_weights.state({name: a.shape for name, a in to_state_dict(BLANK).items()})
EMA = {name: array + np.float32(0.25) for name, array in STATE.items()}
THEIRS = by_diffusers(STATE)
THEIR_EMA = by_diffusers(EMA)
BUFFERS = {"betas": np.ones(1000, np.float32), "sqrt_alphas_cumprod": np.ones(1000, np.float32)}
ADAM = {"state": {0: {"step": 7, "exp_avg": np.zeros(3)}}, "param_groups": [{"lr": 2e-4}]}


def under(prefix, state=STATE):
    return {f"{prefix}.{name}": array for name, array in state.items()}


# Containers: what is in the file, options, which weights are taken, and the facts that say so.
EMA_MODEL = {**under("ema_model", EMA), **under("online_model"), "initted": np.ones(1)}
LIGHTNING = {
    **{"epoch": 3, "global_step": 900, "pytorch-lightning_version": "2.4.0", "loops": {"fit": {}}},
    **{"callbacks": {"ModelCheckpoint": {"best_model_score": np.ones(()), "best": "a.ckpt"}}},
    **{"optimizer_states": [ADAM], "lr_schedulers": [], "hyper_parameters": {"lr": 1e-4}},
}
GOOD = {
    "state_dict": ({"state_dict": STATE}, {}, STATE, {"part": "state_dict"}),
    "model and ema": (
        {"model": STATE, "ema": EMA, "opt": ADAM, "step": 7}, {}, EMA,
        {"part": "ema", "weights": "moving average", "step": 7}),
    "model of two": (
        {"model": STATE, "ema": EMA}, {"ema": False}, STATE, {"part": "model", "weights": "last"}),
    "model by name": ({"model": STATE, "ema": EMA}, {"part": "model"}, STATE, {"part": "model"}),
    "model_state_dict": (
        {"epoch": 1, "model_state_dict": STATE, "optimizer_state_dict": ADAM, "loss": 0.5}, {},
        STATE, {"weights": "as stored"}),
    "ema_state_dict": ({"model_state_dict": STATE, "ema_state_dict": EMA}, {}, EMA, {}),
    "model_ema": ({"model": STATE, "model_ema": EMA}, {}, EMA, {}),
    "lucidrains": (
        {"step": 7, "model": under("model"), "opt": ADAM, "ema": EMA_MODEL, "scaler": None}, {},
        EMA, {"part": "ema.ema_model", "step": 7}),
    "lucidrains, model": (
        {"model": under("model"), "opt": ADAM, "ema": EMA_MODEL}, {"ema": False}, STATE,
        {"part": "model"}),
    "lucidrains, online": (
        {"model": under("model", EMA), "ema": EMA_MODEL}, {"part": "ema.online_model"}, STATE, {}),
    "Lightning": (
        {**LIGHTNING, "state_dict": under("net")}, {}, STATE, {"step": 900}),
    "Lightning with an average": (
        {**LIGHTNING, "state_dict": {**under("net"), **under("net_ema", EMA)}}, {}, EMA,
        {"part": "state_dict.net_ema"}),
    "average of a callback": (
        {**LIGHTNING, "state_dict": STATE, "callbacks": {"EMA": {"ema_state_dict": EMA}}}, {}, EMA,
        {"part": "callbacks.EMA.ema_state_dict"}),
    "compiled and parallel": (under("module._orig_mod"), {}, STATE, {}),
    "diffusion_model": (under("model.diffusion_model"), {}, STATE, {}),
    "denoise_fn with buffers": (
        {**under("denoise_fn"), **BUFFERS}, {"ignore": ("betas", "sqrt_*")}, STATE,
        {"ignored": ["betas", "sqrt_alphas_cumprod"]}),
    "logvar": (
        {"state_dict": {**under("model"), "model.logvar": np.zeros(9)}}, {"ignore": "logvar"},
        STATE, {"ignored": ["model.logvar"]}),
    "diffusers' names": (
        {"model": under("unet", THEIRS)}, {"config": TINY, "image_size": None}, STATE,
        {"names": "diffusers"}),
}  # fmt: skip


@pytest.mark.parametrize("what", GOOD)
def test_containers(tmp_path, what):
    value, options, want, facts = GOOD[what]
    path = tmp_path / "m.pt"
    path.write_bytes(torch_writer.saved(value))
    model = load_model(path, **{**SIZED, **options})
    assert_same(model.params, from_state_dict(want, TINY))
    assert {name: model.facts[name] for name in facts} == facts


@pytest.mark.parametrize("choice", [{"ema": False}, {"part": "state_dict.net"}])
def test_buffers_beside_two_networks_are_named_whatever_is_chosen(choice):
    two = {"state_dict": {**under("net"), **under("net_ema", EMA), **BUFFERS}}
    with pytest.raises(ValueError, match="named net or net_ema.*lie beside: betas.*--ignore betas"):
        find_state(two, **choice)
    got, _ = find_state(two, **choice, ignore=("betas", "sqrt_*"))
    assert_same(got, STATE)


@pytest.mark.parametrize("names", ["the DDIM authors", "diffusers"])
def test_plain_safetensors(tmp_path, names):
    """Of half precision, with a prefix, beside nothing; and a network told by its config.json."""
    state = STATE if names == "the DDIM authors" else THEIRS
    half = {
        name: array.astype(ml_dtypes.bfloat16) for name, array in under("module", state).items()
    }
    safetensors.numpy.save_file(half, tmp_path / "m.safetensors")
    (tmp_path / "their.json").write_text(json.dumps(unet_settings(TINY)))
    told = {"image_size": 8} if names != "diffusers" else {"config": str(tmp_path / "their.json")}
    model = load_model(tmp_path / "m.safetensors", schedule=ScheduleConfig(), **told)
    assert (model.facts["names"], model.config) == (names, TINY)
    for got, want in zip(*map(jax.tree.leaves, (model.params, from_state_dict(STATE, TINY)))):
        assert got.dtype == np.float32
        np.testing.assert_allclose(got, want, rtol=2**-8)  # bfloat16 has 8 bits


# Folders of diffusers.


def write(folder, files):
    folder.mkdir(parents=True, exist_ok=True)
    settings = {"config.json": unet_settings(TINY), "scheduler_config.json": SCHEDULER}
    for name, content in {**settings, **files}.items():
        if isinstance(content, bytes):
            (folder / name).write_bytes(content)
        elif name.endswith(".json"):
            text = content if isinstance(content, str) else json.dumps(content)
            (folder / name).write_text(text)
        elif name.endswith(".bin"):
            (folder / name).write_bytes(torch_writer.saved(content))
        else:
            safetensors.numpy.save_file(content, folder / name)
    return folder


def shards(form="safetensors", count=3, mark="", theirs=THEIRS):
    """(files, index) as diffusers splits them."""
    names = [f"{STEM}{mark}-{i + 1:05}-of-{count:05}.{form}" for i in range(count)]
    where = {tensor: names[i * count // len(theirs)] for i, tensor in enumerate(theirs)}
    files = {name: {t: theirs[t] for t in where if where[t] == name} for name in names}
    return files, {"metadata": {"total_size": 1}, "weight_map": where}


SCHEDULER = {"_class_name": "DDPMScheduler"}
HALF = {name: array.astype(np.float16) for name, array in THEIRS.items()}
PLAIN = {f"{STEM}.safetensors": THEIRS}
FOLDERS = {  # files, options, the variant that the facts name
    "bin": ({f"{STEM}.bin": THEIRS}, {}, None),
    "compiled": ({f"{STEM}.bin": under("_orig_mod", THEIRS)}, {}, None),
    "safetensors before bin": ({**PLAIN, f"{STEM}.bin": THEIR_EMA}, {}, None),
    "only fp16": ({f"{STEM}.fp16.safetensors": HALF}, {}, "fp16"),
    "plain before fp16": ({**PLAIN, f"{STEM}.fp16.safetensors": THEIR_EMA}, {}, None),
    "fp16 by choice": (
        {f"{STEM}.bin": THEIR_EMA, f"{STEM}.fp16.bin": THEIRS}, {"variant": "fp16"}, "fp16"),
    "one of two": (
        {f"{STEM}.non_ema.bin": THEIRS, f"{STEM}.fp16.bin": THEIR_EMA}, {"variant": "non_ema"},
        "non_ema"),
    "shards": ({**shards()[0], f"{STEM}.safetensors.index.json": shards()[1]}, {}, None),
    "shards of bin": ({**shards("bin")[0], f"{STEM}.bin.index.json": shards("bin")[1]}, {}, None),
    "shards of fp16": (
        {**shards(mark=".fp16")[0], f"{STEM}.safetensors.index.fp16.json": shards(mark=".fp16")[1]},
        {}, "fp16"),
    "shards of fp16, as once": (
        {**shards(mark=".fp16")[0], f"{STEM}.safetensors.fp16.index.json": shards(mark=".fp16")[1]},
        {}, "fp16"),
    "buffers": ({f"{STEM}.bin": {**THEIRS, "logvar": np.ones(3)}}, {"ignore": ["logvar"]}, None),
}  # fmt: skip


@pytest.mark.parametrize("what", FOLDERS)
def test_files_of_a_folder(tmp_path, what):
    files, options, variant = FOLDERS[what]
    model = load_model(write(tmp_path / "a", files), **options)
    assert model.facts.get("variant") == variant
    for got, want in zip(*map(jax.tree.leaves, (model.params, from_state_dict(STATE, TINY)))):
        assert got.dtype == np.float32
        np.testing.assert_allclose(got, want, rtol=2**-11, atol=1e-7)  # float16 has 11 bits


def test_a_file_of_a_folder_by_its_path(tmp_path):
    folder = write(tmp_path / "a", {**PLAIN, f"{STEM}.ema.bin": THEIR_EMA})
    model = load_model(folder / f"{STEM}.ema.bin")
    assert_same(model.params, from_state_dict(EMA, TINY))
    assert model.facts["variant"] == "ema"


def test_a_checkpoint_of_the_training_script(tmp_path):
    """unet_ema/ beside unet/, with the average's own settings; the scheduler above, at the end."""
    decay = {"decay": 0.9999, "min_decay": 0.0, "optimization_step": 500, "update_after_step": 0}
    decay |= {"use_ema_warmup": True, "inv_gamma": 1.0, "power": 0.75}
    folder = tmp_path / "checkpoint-500"
    write(folder / "unet", PLAIN)
    average = {f"{STEM}.safetensors": THEIR_EMA, "config.json": {**unet_settings(TINY), **decay}}
    write(folder / "unet_ema", average)
    with pytest.raises(ValueError, match="holds no noise schedule"):
        load_model(folder)
    write(tmp_path / "scheduler", {})
    for path, ema, want in (
        *((folder, True, EMA), (folder, False, STATE)),
        *((folder / "unet_ema", True, EMA), (folder / "unet", True, STATE)),
    ):
        model = load_model(path, ema=ema)
        assert_same(model.params, from_state_dict(want, TINY))
        assert (model.facts.get("weights") == "moving average") == (want is EMA)
    with pytest.raises(ValueError, match="ema=False, but it holds one set"):
        load_model(folder / "unet", ema=False)


# What is refused, and what the message says.

FILES, INDEX = shards()
FIRST, SECOND, THIRD = FILES
SHARDED = {**FILES, f"{STEM}.safetensors.index.json": INDEX}
T = next(iter(THEIRS))  # in FIRST


def index(**changes):
    return {**SHARDED, f"{STEM}.safetensors.index.json": {**INDEX, **changes}}


def moved(name):
    return index(weight_map={**INDEX["weight_map"], T: name})


def shard(name, **tensors):
    return {**SHARDED, name: {**FILES[name], **tensors}}


TWICE = json.dumps(INDEX).replace(f'"{T}":', f'"{T}": "{SECOND}", "{T}":')
CALL = torch_writer.Call("argparse", "Namespace")
ONE = np.ones((1, 2), np.float32)


def laughs(width=50, depth=5):
    """A dict of 50 times the dict before, five times over."""
    keys = [b"X\x03\0\0\0k%02d" % i for i in range(width)]
    value = keys[0] + b"}q\x00"
    for i in range(depth):
        value += keys[i + 1] + b"}(" + (b"h%c" % i).join([*keys, b""]) + b"uq%c" % (i + 1)
    return torch_writer.zipped(b"}(" + value + b"u", [])


BAD = {
    # Containers.
    "a Namespace": (
        torch_writer.zipped({"args": CALL, "w": torch_writer.tensor()}), {},
        r"argparse.Namespace, which is not plain data; refused(?s:.*)weights_only=False\)(?s:.*)"
        r"torch.save\(d\["),
    "a config object": (
        torch_writer.zipped({"cfg": torch_writer.Name("omegaconf.dictconfig", "DictConfig")}), {},
        "omegaconf.dictconfig.DictConfig, which is not plain data"),
    "nothing": ({}, {}, "a dict of nothing where a state dict belongs"),
    "numbers": ({"step": 3, "loss": 0.5}, {}, r"a dict of 'step' \(int\), 'loss' \(float\) where"),
    "an optimiser": (ADAM, {}, r"a dict of 'state' \(dict\), 'param_groups' \(list\) where"),
    "a number of a metric": ({"best": np.ones(())}, {}, r"a dict of 'best' \(ndarray\) where"),
    "two networks": (
        {"generator": STATE, "teacher": EMA}, {},
        r"'generator' \(\d+ tensors\), 'teacher' .* choose one by part='generator', or --part"),
    "two averages": (
        {"model": STATE, "ema": EMA, "ema_2": EMA}, {}, "choose one by part='ema', or --part ema"),
    "two networks in one": (
        {"state_dict": {**under("net"), **under("unet")}}, {}, "by part='state_dict.net'"),
    "no such part": ({"model": STATE}, {"part": "ema"}, r"no part 'ema'; it has 'model' \(\d+"),
    "no average": ({"model": STATE}, {"ema": False}, "ema=False, but it holds one set"),
    "two parts and no average": (
        {"a": STATE, "b": STATE}, {"ema": False}, "choose one by part='a'"),
    "averages alone": (
        {"ema": EMA, "ema_2": EMA}, {"ema": False}, "choose one by part='ema'"),
    "buffers beside": (
        {**under("model"), **BUFFERS}, {},
        r"tensors are named model.…, and 2 lie beside: betas, sqrt_alphas_cumprod; to leave them "
        r"out: ignore=\('betas', 'sqrt_alphas_cumprod'\), or --ignore betas sqrt_alphas_cumprod"),
    "a buffer among them": (
        {**STATE, "logvar": np.ones(2)}, {}, r"1 left over: logvar\n  to leave them out: ignore="),
    "batch norm": (
        {**STATE, "norm_in.num_batches_tracked": np.ones((), np.int64)}, {},
        "1 left over: norm_in.num_batches_tracked"),
    "ignored and not there": (STATE, {"ignore": ("logvar",)}, "ignore='logvar', but no tensor"),
    "all ignored": (STATE, {"ignore": ("*",)}, "where a state dict belongs"),
    "a weight ignored": (
        STATE, {"ignore": ("conv_in.bias",)}, "1 missing: conv_in.bias"),
    "half with a prefix": (
        {**under("module"), "conv_in.weight": ONE}, {},
        "named module.…, and 1 lie beside: conv_in.weight"),
    "foreign names": (
        {"layer1.weight": ONE}, {}, "not the names of .* diffusers, OpenAI; it has layer1"),
    "a billion dicts": (
        laughs(), {}, "more than 10000 dicts in dicts"),
    "prefix of a prefix of …": (
        {"module." * 999 + "a.b": ONE}, {}, "not the names of .* diffusers"),
    "two parts of one name": (
        {"a.b": STATE, "a": {"b": EMA}}, {}, "two parts called 'a.b'"),
    "OpenAI's": ({"input_blocks.0.0.weight": ONE}, {}, "names of OpenAI's networks"),
    "diffusers' without settings": (THEIRS, {}, "config='config.json', --config config.json"),
    "diffusers' with another's": (
        THEIRS, {"config": "cifar10", "image_size": None}, "weights are not this network's"),
    "variant of a file": (STATE, {"variant": "fp16"}, "variant='fp16' is for a diffusers folder"),
    "safetensors without names": (
        safetensors.numpy.save({"w": ONE}), {}, r"a dict of 'w' \(ndarray\) where"),
    # Files of a folder.
    "no weights": ({"folder": {}}, {}, "neither .*safetensors nor .*bin, nor an index of shards"),
    "shards without index": ({"folder": FILES}, {}, "nor an index of shards; it has config.json"),
    "two variants": (
        {"folder": {f"{STEM}.a.bin": THEIRS, f"{STEM}.b.bin": THEIRS}}, {},
        "the variants a, b of its weights .* variant='a', --variant a"),
    "no such variant": (
        {"folder": PLAIN}, {"variant": "fp16"}, "no variant 'fp16' .* it has plain weights"),
    "part of a folder": ({"folder": PLAIN}, {"part": "ema"}, "part='ema' is for a PyTorch"),
    "bin of a list": ({"folder": {f"{STEM}.bin": [THEIRS]}}, {}, "is no state dict of tensors"),
    "bin of parts": ({"folder": {f"{STEM}.bin": {"model": THEIRS}}}, {}, "is no state dict of"),
    "a shard is missing": (
        {"folder": {n: f for n, f in SHARDED.items() if n != SECOND}}, {},
        f"names shards that are not there: {SECOND}"),
    "a tensor is missing": (
        {"folder": {**SHARDED, FIRST: {n: a for n, a in FILES[FIRST].items() if n != T}}}, {},
        f"{FIRST} lacks tensors that the index has in it: {T}"),
    "a tensor too many": (
        {"folder": shard(THIRD, logvar=ONE)}, {},
        f"{THIRD} holds tensors that the index does not have in it: logvar"),
    "a tensor in two shards": (
        {"folder": shard(SECOND, **{T: THEIRS[T]})}, {},
        f"{SECOND} holds tensors that the index does not have in it: {T}"),
    "a tensor twice in the index": (
        {"folder": {**SHARDED, f"{STEM}.safetensors.index.json": TWICE}}, {},
        f"'{T}' stands in it twice"),
    "a shard above": ({"folder": moved(f"../{FIRST}")}, {}, "named by its bare file name"),
    "a shard anywhere": ({"folder": moved("/etc/passwd")}, {}, "named by its bare file name"),
    "a shard on a drive": ({"folder": moved("c:\\x.safetensors")}, {}, "its bare file name"),
    "a shard of another kind": ({"folder": moved("a.bin")}, {}, "'a.bin', which is no safetensors"),
    "a shard of a number": ({"folder": moved(1)}, {}, "in 1; a shard is named"),
    "no map": ({"folder": index(weight_map=None)}, {}, "no index of shards, which has a weig"),
    "an empty map": ({"folder": index(weight_map={})}, {}, "names no tensors"),
    "a broken index": (
        {"folder": {**SHARDED, f"{STEM}.safetensors.index.json": "{"}}, {}, "no index of shards"),
    "a broken shard": (
        {"folder": {**SHARDED, SECOND: b"\xff" * 20}}, {}, f"{SECOND} is not an intact safe"),
    "a hostile shard": (
        {"folder": {
            **shards("bin", 1)[0], f"{STEM}.bin.index.json": shards("bin", 1)[1],
            f"{STEM}-00001-of-00001.bin": torch_writer.zipped(
                torch_writer.Call("posix", "system", "touch pwned"))}}, {},
        "posix.system, which is not plain data"),
    "a pipeline of latents": (
        {"folder": {**PLAIN, "model_index.json": {"_class_name": "LDMPipeline",
            "vqvae": ["diffusers", "VQModel"], "mel": [None, None], "unet": ["a", "b"]}}}, {},
        "a pipeline that needs vqvae too, which is not read here"),
    # The Hub, without it.
    "revision of a file": (STATE, {"revision": "main"}, "revision: of models on the Hub"),
    "token of a folder": (
        {"folder": PLAIN}, {"token": "x", "subfolder": "unet"}, "subfolder, token: of models on"),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD)
def test_what_is_refused(tmp_path, monkeypatch, what):
    monkeypatch.chdir(tmp_path)
    content, options, says = BAD[what]
    path = tmp_path / ("m.safetensors" if "safetensors" in what else "m.pt")
    if isinstance(content, dict) and "folder" in content:
        path, sized = write(tmp_path / "m", content["folder"]), {}
    else:
        sized = SIZED
        path.write_bytes(content if isinstance(content, bytes) else torch_writer.saved(content))
    with pytest.raises(ValueError, match=says) as error:
        load_model(path, **{**sized, **options})
    assert "m.pt" in str(error.value) or str(tmp_path / "m") in str(error.value)
    assert not (tmp_path / "pwned").exists()


def test_the_table_of_refusals_is_as_long_as_it_should_be():
    assert len(BAD) >= 50


def test_the_words_that_choose(tmp_path):
    """`part` and `ema` of nested averages, without files."""
    w, average = np.zeros(1), np.ones(1)
    nested = {"ema": {"online_model.c.w": w, "ema_model.c.w": average, "step": np.ones(())}}
    assert find_state(nested)[0]["c.w"] is average
    state, facts = find_state(nested, ema=False)
    assert (state["c.w"] is w, facts) == (True, {"weights": "last", "part": "ema.online_model"})


# Beside what PyTorch and diffusers write.


@pytest.fixture(scope="module")
def peers():
    why = "needs the peers extra: pip install 'ddim_jax[peers]'"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch = pytest.importorskip("torch", reason=why)
        diffusers = pytest.importorskip("diffusers", reason=why)
    return torch, diffusers


@pytest.mark.filterwarnings("default")
def test_a_checkpoint_with_all_that_training_keeps(tmp_path, peers):
    torch, _ = peers
    state = OrderedDict((f"net.{name}", torch.tensor(a)) for name, a in STATE.items())
    weight = torch.nn.Parameter(torch.zeros(3))
    optimiser = torch.optim.Adam([weight])
    weight.sum().backward()
    optimiser.step()
    steps = torch.optim.lr_scheduler.MultiStepLR(optimiser, [30, 60])
    settings = {"device": torch.device("cuda", 1), "classes": {3, 5}, "type": torch.float32}
    value = {
        **LIGHTNING,
        "state_dict": state,
        "optimizer_states": [optimiser.state_dict()],
        "lr_schedulers": [steps.state_dict()],
        "hyper_parameters": settings,
        "callbacks": {"ModelCheckpoint": {"best_model_score": torch.tensor(0.5)}},
        "best": np.float64(1 / 3),
        "worst": np.int8(-7),
    }
    torch.save(value, tmp_path / "last.ckpt")
    read = load_torch(tmp_path / "last.ckpt")
    assert (read["best"], read["worst"]) == (1 / 3, -7)
    assert read["hyper_parameters"]["device"] == "cuda:1"
    assert sorted(read["hyper_parameters"]["classes"]) == [3, 5]
    assert read["lr_schedulers"][0]["milestones"] == {30: 1, 60: 1}
    assert_same(load_model(tmp_path / "last.ckpt", **SIZED).params, from_state_dict(STATE, TINY))


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("variant", [None, "fp16"])
@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "bin"])
def test_shards_that_diffusers_writes(tmp_path, peers, variant, safe):
    torch, diffusers = peers
    settings = unet_settings(TINY)
    del settings["_class_name"]
    network = diffusers.UNet2DModel(**settings)
    network.load_state_dict({name: torch.tensor(a) for name, a in THEIRS.items()})
    network.save_pretrained(
        tmp_path, max_shard_size="500KB", variant=variant, safe_serialization=safe
    )
    diffusers.DDPMScheduler().save_pretrained(tmp_path)
    assert len(list(tmp_path.glob("*-of-*"))) > 1
    model = load_model(tmp_path)
    assert model.facts.get("variant") == variant
    assert_same(model.params, from_state_dict(STATE, TINY))


@pytest.mark.filterwarnings("default")
def test_the_average_that_diffusers_writes(tmp_path, peers):
    torch, diffusers = peers
    from diffusers.training_utils import EMAModel

    settings = unet_settings(TINY)
    del settings["_class_name"]
    network = diffusers.UNet2DModel(**settings)
    network.load_state_dict({name: torch.tensor(a) for name, a in THEIRS.items()})
    average = EMAModel(
        network.parameters(), model_cls=diffusers.UNet2DModel, model_config=network.config
    )
    average.save_pretrained(tmp_path / "unet_ema")
    network.save_pretrained(tmp_path / "unet")
    model = load_model(tmp_path, schedule=ScheduleConfig())
    assert model.facts["weights"] == "moving average"
    assert_same(model.params, from_state_dict(STATE, TINY))
