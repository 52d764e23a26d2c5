"""diffusers folders: numbers that diffusers computed, refused settings, round trips."""

import dataclasses
import json
import re
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ddim_jax as ddim
from ddim_jax.networks import unet
from ddim_jax.process.schedule_config import ScheduleConfig
from ddim_jax.storage.weights_file import write_safetensors
from ddim_jax.weights import load_model, save_diffusers, to_facts
from ddim_jax.weights.diffusers_config import unet_config, unet_settings
from ddim_jax.weights.diffusers_format import check_settings, diffusers_name, write_diffusers
from ddim_jax.weights.diffusers_scheduler import schedule_config, scheduler_settings
from ddim_jax.weights.model import stored
from ddim_jax.weights.openai_config import respaced
from ddim_jax.weights.state_dict import to_state_dict
from tests import pseudo_weights, torch_writer
from tests.tiny import UNET as TINY

SCHEDULER = {"_class_name": "DDIMScheduler", "clip_sample": False, "prediction_type": "epsilon"}
# config.json of google/ddpm-cifar10-32 and what google/ddpm-celebahq-256 has in its place.
CIFAR10 = json.loads("""{
  "_class_name": "UNet2DModel", "_diffusers_version": "0.0.4", "act_fn": "silu",
  "attention_head_dim": null, "block_out_channels": [128, 256, 256, 256],
  "center_input_sample": false, "downsample_padding": 0, "flip_sin_to_cos": false, "freq_shift": 1,
  "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"],
  "in_channels": 3, "layers_per_block": 2, "mid_block_scale_factor": 1, "norm_eps": 1e-06,
  "norm_num_groups": 32, "out_channels": 3, "sample_size": 32, "time_embedding_type": "positional",
  "up_block_types": ["UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"]
}""")
CELEBAHQ = {
    **CIFAR10,
    "sample_size": 256,
    "block_out_channels": [128, 128, 256, 256, 512, 512],
    "down_block_types": [*["DownBlock2D"] * 4, "AttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "AttnUpBlock2D", *["UpBlock2D"] * 4],
}


def tiny_state(config=TINY):
    """Pseudo-random weights by the names of diffusers."""
    blank = jax.tree.map(lambda leaf: np.zeros(leaf.shape), unet.abstract_params(config))
    shapes = {
        diffusers_name(name, config): a.shape[:2] if is_linear(name) else a.shape
        for name, a in to_state_dict(blank).items()
    }
    return pseudo_weights.state(shapes)


def is_linear(name):
    return name.endswith((".q.weight", ".k.weight", ".v.weight", ".proj_out.weight"))


def write_folder(folder, settings=None, scheduler=SCHEDULER, state=None, weights=True):
    folder.mkdir(parents=True, exist_ok=True)
    settings = unet_settings(TINY) if settings is None else settings
    (folder / "config.json").write_text(json.dumps(settings))
    if scheduler is not None:
        (folder / "scheduler_config.json").write_text(json.dumps(scheduler))
    if weights:
        state = tiny_state() if state is None else state
        write_safetensors(folder / "diffusion_pytorch_model.safetensors", state, {})
    return folder


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("tiny"))


def test_numbers_of_diffusers(tiny):
    """UNet2DModel of diffusers 0.42 in float64, with the same weights by the same names."""
    model = load_model(tiny)
    assert model.config == TINY
    x = jnp.asarray(2 * pseudo_weights.uniform("x", (2, 8, 8, 3)) - 1, jnp.float32)
    y = np.asarray(jax.jit(model.apply_fn)(model.params, x, jnp.array([1, 700])))
    got = [y[0, 0, 0], y[0, 7, 7], y[1, 3, 4], y[1, 0, 7]]
    expected = [
        [0.44524191, 0.43648799, 0.08396114],
        [0.33560328, -0.15653183, 0.45943644],
        [0.52515117, 1.36752502, 2.30371641],
        [0.36777155, 0.81959482, 0.30577684],
    ]
    np.testing.assert_allclose(got, expected, rtol=0, atol=2e-5)


def test_settings_of_known_models():
    assert unet_config(CIFAR10) == unet.UNetConfig(dropout=0.0)
    lsun = unet.UNetConfig(image_size=256, multipliers=(1, 1, 2, 2, 4, 4), dropout=0.0)
    assert unet_config(CELEBAHQ) == lsun
    one_head = {**CELEBAHQ, "attention_head_dim": 512}  # attention has 512 channels everywhere
    assert unet_config(one_head) == lsun


def test_oblong_images(tmp_path):
    settings = {**unet_settings(TINY), "sample_size": [8, 16]}
    model = load_model(write_folder(tmp_path / "model", settings))
    assert model.image_shape == (8, 16, 3)
    assert unet_settings(model.config)["sample_size"] in ([8, 16], (8, 16))
    square = load_model(write_folder(tmp_path / "square", {**settings, "sample_size": [8, 8]}))
    assert square.config == TINY
    x, t = jnp.zeros((1, *model.image_shape)), jnp.array([5])
    oblong, longer = (m.apply_fn(m.params, x, t) for m in (model, square))
    np.testing.assert_array_equal(oblong, longer)  # attention at the same levels


@pytest.mark.parametrize("layout", ["flat", "pipeline", "unet", "weights file", "bin", "old names"])
def test_layouts(tmp_path, tiny, layout):
    state = tiny_state()
    path = tmp_path / "model"
    if layout in ("pipeline", "unet"):
        write_folder(path / "unet", scheduler=None)
        (path / "scheduler").mkdir()
        (path / "scheduler" / "scheduler_config.json").write_text(json.dumps(SCHEDULER))
        (path / "model_index.json").write_text("{}")
        path = path / "unet" if layout == "unet" else path
    elif layout == "bin":
        write_folder(path, weights=False)
        (path / "diffusion_pytorch_model.bin").write_bytes(torch_writer.saved(state))
    elif layout == "old names":
        old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
        for new, name in old.items():
            state = {key.replace(f".{new}.", f".{name}."): array for key, array in state.items()}
        assert "mid_block.attentions.0.proj_attn.bias" in state
        write_folder(path, state=state)
    else:
        write_folder(path)
        path = path / "diffusion_pytorch_model.safetensors" if "file" in layout else path
    got, want = load_model(path), load_model(tiny)
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), got.params, want.params))
    assert got.config == want.config
    assert got.facts["source"] == "diffusers"
    assert got.facts["sampling"] == {"_class_name": "DDIMScheduler", "clip_sample": False}


def test_half_precision_weights_become_float32(tmp_path, tiny):
    for dtype, tol in ((np.float16, 1e-3), (jnp.bfloat16, 1e-2)):
        state = {name: array.astype(dtype) for name, array in tiny_state().items()}
        folder = write_folder(tmp_path / np.dtype(dtype).name, state=state)
        for a, b in zip(*(jax.tree.leaves(load_model(f).params) for f in (folder, tiny))):
            assert a.dtype == jnp.float32
            np.testing.assert_allclose(a, b, rtol=tol, atol=tol)


@pytest.mark.parametrize(
    ("scheduler", "schedule", "prediction"),
    [
        ({"_class_name": "DDPMScheduler"}, ScheduleConfig(), "eps"),
        ({"_class_name": "PNDMScheduler", "num_train_timesteps": 500},
         ScheduleConfig("linear", 500),
         "eps"),
        (
            {"_class_name": "DDIMScheduler", "beta_schedule": "scaled_linear",
             "beta_start": 0.00085, "beta_end": 0.012, "prediction_type": "v_prediction"},
            ScheduleConfig("scaled_linear"),
            "v",
        ),
        (
            {"_class_name": "DDPMScheduler", "beta_schedule": "squaredcos_cap_v2", "beta_end": 7,
             "prediction_type": "sample"},
            ScheduleConfig("cosine"),
            "x_0",
        ),
        ({"_class_name": "DDPMScheduler", "predict_epsilon": False}, ScheduleConfig(), "x_0"),
        ({"_class_name": "DDIMScheduler", "rescale_betas_zero_snr": True,
          "prediction_type": "v_prediction"}, ScheduleConfig(zero_terminal_snr=True), "v"),
    ],
)  # fmt: skip
def test_schedulers(scheduler, schedule, prediction):
    assert schedule_config(scheduler) == (schedule, prediction)
    back = {"_class_name": "DDIMScheduler"} | scheduler_settings(schedule, prediction)
    assert schedule_config(back) == (schedule, prediction)


LABELS = dataclasses.replace(TINY, num_classes=3)


@pytest.mark.parametrize("config", [TINY, LABELS], ids=["plain", "labels"])
def test_round_trip(tmp_path, config):
    params = unet.build(config, jax.random.key(0))[1]
    facts = {"score": 3, **to_facts(ScheduleConfig("cosine", 50), config, "v")}
    apply_fn = ddim.predicts(unet.make_apply(config), "v")
    model = ddim.Model(apply_fn, params, ddim.cosine_schedule(50), config, facts)
    save_diffusers(tmp_path / "saved", model)
    again = load_model(tmp_path / "saved")
    assert (again.config, again.prediction.kind) == (config, "v")
    np.testing.assert_allclose(again.schedule.alpha_bar, model.schedule.alpha_bar, rtol=1e-12)
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), params, again.params))
    assert again.facts["score"] == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["saved"]  # no temporary left
    with pytest.raises(FileExistsError, match="not an empty folder"):
        save_diffusers(tmp_path / "saved", model)


def test_labels_of_others_are_all_labels(tmp_path):
    """Their last label is a label, ours means none."""
    folder = write_folder(tmp_path / "a", unet_settings(LABELS), state=tiny_state(LABELS))
    model = load_model(folder)
    assert model.config == dataclasses.replace(LABELS, num_classes=4, null_label=False)
    x, t = jnp.zeros((1, 8, 8, 3)), jnp.array([5])
    assert (
        jax.eval_shape(model.apply_fn, model.params, x, t, labels=jnp.array([3])).shape == x.shape
    )
    with pytest.raises(ValueError, match=r"without labels: give \(B,\) in 0\.\.3, as its table"):
        model.denoise(x, t)
    with pytest.raises(ValueError, match=r"labels must be in 0\.\.3, .* got 4"):
        model.apply_fn(model.params, x, t, labels=jnp.array([4]))


def test_networks_that_diffusers_has_not():
    lacks = {
        "multipliers": ((2, 2), r"multipliers\[0\] is 2, it has 1"),
        "sinusoids": (16, "sinusoids are 16, it has 64"),
        "resample_up": ("pool", "resample_up has 'pool'"),
        "num_heads_up": (4, r"several widths, \[16, 64\]"),
        "middle_norm_groups": (0, "middle_norm_groups is 0"),
    }
    fields = {name: value for name, (value, _) in lacks.items()}
    config = dataclasses.replace(TINY, channels=32, **fields)
    with pytest.raises(ValueError, match="diffusers has no such network") as error:
        unet_settings(config)  # all in one message
    for _, says in lacks.values():
        assert re.search(says, str(error.value)), says
    mixed = dataclasses.replace(
        TINY, multipliers=(1, 2, 2), attention_resolutions=(8, 4), resample_down=("conv", "block")
    )
    with pytest.raises(ValueError, match="resample_down has both 'conv' and 'block'"):
        unet_settings(mixed)


def test_a_scheduler_that_is_not_read_stands_in_no_way(tmp_path):
    folder = write_folder(tmp_path / "model", scheduler={"_class_name": "OurScheduler"})
    with pytest.raises(ValueError, match="OurScheduler.*give schedule and prediction, --schedule"):
        load_model(folder)
    with pytest.raises(ValueError, match="OurScheduler"):  # its prediction type is not guessed
        load_model(folder, schedule=ScheduleConfig())
    model = load_model(folder, schedule=ScheduleConfig(), prediction="v")
    assert model.prediction.kind == "v"
    assert "sampling" not in model.facts
    check_settings(folder, scheduled=True)  # of the Hub, before the weights are fetched


def test_another_size_stands_for_one_that_does_not_fit(tmp_path):
    folder = write_folder(tmp_path / "model", {**unet_settings(TINY), "sample_size": 9})
    with pytest.raises(ValueError, match="got 9"):
        check_settings(folder)
    check_settings(folder, image_size=8)
    assert load_model(folder, image_size=8, schedule=ScheduleConfig()).config == TINY


def test_a_learned_variance_is_written_for_the_scheduler_that_takes_it(tmp_path):
    config = dataclasses.replace(TINY, out_channels=6)
    params = unet.build(config, jax.random.key(0))[1]
    write_diffusers(tmp_path / "out", params, config, ScheduleConfig(), "eps", {})
    index = json.loads((tmp_path / "out" / "model_index.json").read_text())
    assert (index["_class_name"], index["scheduler"][1]) == ("DDPMPipeline", "DDPMScheduler")
    model = load_model(tmp_path / "out")
    assert model.facts["sampling"]["variance_type"] == "learned_range"
    np.testing.assert_array_equal(stored(model, 7).tau, respaced(1000, "7"))  # OpenAI's own τ


def test_a_folder_without_scheduler(tmp_path):
    folder = write_folder(tmp_path / "a", scheduler=None)
    with pytest.raises(ValueError, match="holds no noise schedule: pass schedule="):
        load_model(folder)
    model = load_model(folder, schedule=ScheduleConfig("cosine", 20), prediction="v")
    assert (model.schedule.num_steps, model.prediction.kind) == (20, "v")
    assert model.facts["prediction"] == "v"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"_class_name": "UNet2DConditionModel"}, "_class_name is 'UNet2DConditionModel'"),
        ({"attention_head_dim": 128}, "head_width must be at most 64"),
        ({"attention_head_dim": 0}, "attention_head_dim is 0, not a whole number >= 1"),
        ({"norm_eps": "small"}, "norm_eps is 'small', not a number"),
        ({"norm_eps": -1e-5}, "norm_eps must be a number above 0"),
        ({"norm_num_groups": 24}, "multiple of 24"),
        ({"norm_num_groups": None}, "norm_num_groups is None, not a whole number"),
        ({"flip_sin_to_cos": "no"}, "flip_sin_to_cos is 'no'; known are False, True"),
        ({"freq_shift": 16}, "frequency_shift must be below 16"),
        ({"downsample_padding": 2}, "downsample_padding is 2; known are 0, 1"),
        ({"center_input_sample": None}, "center_input_sample is None"),
        ({"time_embedding_type": "fourier"}, "'fourier', which is for the variance-exploding"),
        ({"time_embedding_type": "learned"}, "num_train_timesteps is None"),
        ({"time_embedding_dim": [64]}, r"time_embedding_dim is \[64\]"),
        ({"mid_block_type": "UNetMidBlock2DCrossAttn"}, "mid_block_type is 'UNetMidBlock2DCross"),
        ({"mid_block_scale_factor": 0}, "middle_scale must be a number above 0"),
        ({"downsample_type": "fir"}, "downsample_type is 'fir'; known are 'conv', 'resnet', None"),
        ({"upsample_type": ["conv"]}, r"upsample_type is \['conv'\]"),
        ({"act_fn": "tanh"}, "act_fn is 'tanh'; known are 'silu'"),
        ({"act_fn": None}, "act_fn is None"),
        ({"resnet_time_scale_shift": "spatial"}, "resnet_time_scale_shift is 'spatial'"),
        ({"add_attention": "yes"}, "add_attention is 'yes'"),
        ({"attn_norm_num_groups": 7}, "middle_norm_groups must divide 64"),
        ({"class_embed_type": "projection"}, "class_embed_type is 'projection'"),
        ({"num_class_embeds": -1}, "num_class_embeds is -1"),
        ({"out_channels": None}, "out_channels is None"),
        ({"sample_size": None}, "sample_size is null: pass image_size, --image-size"),
        ({"sample_size": [8]}, r"sample_size is \[8\], a side or \[H, W\]"),
        ({"sample_size": "8"}, "sample_size is '8', a side"),
        ({"sample_size": [8, 9]}, "multiple of 2"),
        ({"sample_size": 9}, "multiple of 2"),
        (
            {"down_block_types": ["SkipDownBlock2D", "AttnDownBlock2D"]},
            "'SkipDownBlock2D', which is",
        ),
        ({"up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"]}, "takes a text or an image too"),
        ({"up_block_types": ["KUpBlock2D", "UpBlock2D"]}, "'KUpBlock2D', which is of a network"),
        ({"up_block_types": ["DownBlock2D", "UpBlock2D"]}, "up_block_types has 'DownBlock2D'"),
        ({"down_block_types": ["DownBlock2D"]}, "down_block_types is .*, not as long as"),
        ({"down_block_types": "DownBlock2D"}, "down_block_types is 'DownBlock2D', not a list"),
        (
            {"block_out_channels": [64, 95]},
            r"multipliers\[1\] \* channels must be a multiple of 32",
        ),
        ({"block_out_channels": []}, "block_out_channels is"),
        ({"block_out_channels": 64}, "block_out_channels is 64, not a list of widths"),
        ({"block_out_channels": [33, 66]}, "multiple of 32"),
        ({"block_out_channels": [32, 10**400]}, "in our words: int too large"),
        ({"layers_per_block": "two"}, "layers_per_block is 'two', not a whole number"),
        ({"layers_per_block": 10**12}, "too few for 2 levels of 1000000000000 blocks"),
        ({"novel": 1}, "unknown here: novel"),
    ],
)
def test_other_networks_are_refused_by_name(tmp_path, change, says):
    folder = write_folder(tmp_path / "folder", {**unet_settings(TINY), **change})
    with pytest.raises(ValueError, match=f"folder.*: (?s:.*){says}"):
        load_model(folder)


def test_all_that_cannot_be_read_is_named_at_once():
    bad = {"act_fn": "tanh", "time_embedding_type": "fourier", "novel": 1, "norm_eps": None}
    blocks = {"down_block_types": ["AttnSkipDownBlock2D", "AttnDownBlock2D"]}
    with pytest.raises(ValueError, match="no network that is read here") as error:
        unet_config({**unet_settings(TINY), **bad, **blocks, "sample_size": None})
    assert len(str(error.value).splitlines()) == 7
    for name in (*bad, *blocks, "sample_size"):
        assert name in str(error.value)


def test_an_absent_setting_has_the_default_of_diffusers():
    config = unet_config({"block_out_channels": [32, 64, 64, 64]}, image_size=(32, 64))
    ours = {"head_width": 8, "norm_eps": 1e-5, "cosine_first": True, "frequency_shift": 0}
    ours |= {"attention_resolutions": (16, 8, 4), "downsample_padding": (1, 1), "dropout": 0.0}
    assert config == unet.UNetConfig((32, 64), 3, 32, **ours)


def test_an_image_size_goes_before_that_of_the_folder(tmp_path):
    folder = write_folder(tmp_path / "folder", {**unet_settings(TINY), "sample_size": None})
    assert load_model(folder, image_size=8).config == TINY
    assert load_model(folder, image_size=(8, 24)).image_shape == (8, 24, 3)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"_class_name": "FlowMatchEulerDiscreteScheduler"}, "_class_name is 'FlowMatch"),
        ({"trained_betas": [0.1]}, "trained_betas is"),
        ({"rescale_betas_zero_snr": "yes"}, "rescale_betas_zero_snr is 'yes'"),
        ({"beta_schedule": "sigmoid"}, "beta_schedule is 'sigmoid'"),
        ({"prediction_type": "flow_prediction"}, "prediction_type is 'flow_prediction'"),
        ({"num_train_timesteps": 10**12}, "num_train_timesteps is 10"),
        ({"num_train_timesteps": "many"}, "num_train_timesteps is 'many'"),
        ({"beta_start": None}, "beta_start is None"),
        ({"beta_start": 0.5, "beta_end": 0.1}, "beta_start <= beta_end"),
    ],
)
def test_other_schedulers_are_refused_by_name(tmp_path, change, says):
    folder = write_folder(tmp_path / "folder", scheduler={**SCHEDULER, **change})
    with pytest.raises(ValueError, match=f"folder.*: .*{says}"):
        load_model(folder)


def test_weights_that_do_not_fit_are_reported_by_name(tmp_path):
    state = tiny_state()
    for name in list(state):
        if name.startswith("up_blocks.1."):
            del state[name]
    state["extra.bias"] = np.zeros(2, np.float32)
    state["conv_in.weight"] = np.zeros((32, 4, 3, 3), np.float32)
    state["conv_out.bias"] = np.full(3, np.nan, np.float32)
    state["conv_norm_out.bias"] = np.zeros(32, np.int32)
    with pytest.raises(ValueError, match="not this network's") as error:
        load_model(write_folder(tmp_path / "a", state=state))
    missing, unused, shape, broken = str(error.value).splitlines()[1:]
    assert missing.strip() == (
        "24 missing: up_blocks.1.resnets.0.conv1.bias, up_blocks.1.resnets.0.conv1.weight, "
        "up_blocks.1.resnets.0.conv2.bias, up_blocks.1.resnets.0.conv2.weight, "
        "up_blocks.1.resnets.0.conv_shortcut.bias, …"
    )
    assert unused.strip() == "1 left over: extra.bias"
    assert shape.strip() == (
        "1 of another shape: conv_in.weight is (32, 4, 3, 3), not (32, 3, 3, 3)"
    )
    assert broken.strip() == "2 not finite numbers: conv_norm_out.bias (int32), conv_out.bias"


def test_broken_folders(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty is a folder, but not a run .* no config.json"):
        load_model(tmp_path / "empty")
    folder = write_folder(tmp_path / "none", weights=False)
    with pytest.raises(
        ValueError,
        match="none: it has neither .*safetensors nor .*bin, nor .*; it has config.json, ",
    ):
        load_model(folder)
    (folder / "config.json").write_text("{" * 100_000)
    with pytest.raises(ValueError, match="config.json is missing or not JSON"):
        load_model(folder)
    (folder / "config.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match="config.json is missing or not JSON"):
        load_model(folder)
    (folder / "config.json").write_text("[]")
    with pytest.raises(ValueError, match="config.json holds a list, not settings"):
        load_model(folder)
    folder = write_folder(tmp_path / "cut", weights=False)
    (folder / "diffusion_pytorch_model.safetensors").write_bytes(b"\xff" * 20)
    with pytest.raises(ValueError, match="not an intact safetensors file"):
        load_model(folder)
    folder = write_folder(tmp_path / "evil", weights=False)
    call = torch_writer.Call("posix", "system", "true")
    (folder / "diffusion_pytorch_model.bin").write_bytes(torch_writer.zipped(call))
    with pytest.raises(ValueError, match="posix.system, which is not plain data; refused"):
        load_model(folder)


# Against diffusers and PyTorch themselves.


@pytest.fixture(scope="module")
def peers():
    why = "needs the peers extra: pip install 'ddim_jax[peers]'"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch = pytest.importorskip("torch", reason=why)
        diffusers = pytest.importorskip("diffusers", reason=why)
    torch.manual_seed(0)
    return torch, diffusers


def random_network(peers, config):
    torch, diffusers = peers
    settings = unet_settings(config)
    del settings["_class_name"]
    network = diffusers.UNet2DModel(**settings).eval()
    with torch.no_grad():
        for weight in network.parameters():
            weight.add_(0.1 * torch.randn_like(weight) if weight.ndim == 1 else 0)
    return network


def call_peer(peers, network, x, t):
    torch, _ = peers
    with torch.no_grad():
        out = network(torch.tensor(x.transpose(0, 3, 1, 2)), torch.tensor(t - 1)).sample
    return out.numpy().transpose(0, 2, 3, 1)


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize(
    ("config", "batch"),
    [
        (unet.UNetConfig(), 2),
        (unet.UNetConfig(image_size=64, channels=32, multipliers=(1, 2, 2, 2, 4)), 2),
        (
            unet.UNetConfig(
                image_size=64,
                channels=64,
                multipliers=(1, 1, 2, 2, 4, 4),
                attention_resolutions=(4,),
                dropout=0.0,
            ),
            1,
        ),
    ],
    ids=["cifar10", "celeba64", "lsun256"],
)
def test_forward_agrees_with_diffusers(tmp_path, peers, config, batch):
    """And after a round trip: theirs → ours → theirs."""
    _, diffusers = peers
    network = random_network(peers, config)
    network.save_pretrained(tmp_path / "theirs")
    diffusers.DDIMScheduler().save_pretrained(tmp_path / "theirs")
    model = load_model(tmp_path / "theirs")
    assert model.config == config
    shape = (batch, config.image_size, config.image_size, 3)
    x = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    t = np.array([1000, 3][:batch])
    want = call_peer(peers, network, x, t)
    got = jax.jit(model.apply_fn)(model.params, x, t)
    assert np.abs(np.asarray(got) - want).max() <= 1e-4 * np.abs(want).max()
    save_diffusers(tmp_path / "ours", model)
    again = diffusers.UNet2DModel.from_pretrained(tmp_path / "ours", subfolder="unet").eval()
    np.testing.assert_array_equal(call_peer(peers, again, x, t), want)


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_samples_agree_with_the_pipeline(tmp_path, peers, prediction):
    """Ten steps, batch of eight, one set of weights, one x_T, by `DDIMPipeline`'s own loop."""
    torch, diffusers = peers
    name = {"eps": "epsilon", "v": "v_prediction"}[prediction]
    config = dataclasses.replace(TINY, image_size=16, attention_resolutions=(8,))
    random_network(peers, config).save_pretrained(tmp_path / "a")
    scheduler = diffusers.DDIMScheduler(clip_sample=False, prediction_type=name)
    scheduler.save_pretrained(tmp_path / "a")
    model = load_model(tmp_path / "a")
    assert model.prediction.kind == prediction
    save_diffusers(tmp_path / "b", model)

    x_T = ddim.initial_noise(jax.random.key(0), 8, model.image_shape)
    tau = ddim.timesteps(1000, 10, "leading")
    sampler = ddim.make_sampler(model, tau)
    got = np.asarray(sampler(x_T))

    pipeline = diffusers.DDIMPipeline.from_pretrained(tmp_path / "b")
    assert not pipeline.scheduler.config.clip_sample
    pipeline.set_progress_bar_config(disable=True)
    noise = torch.tensor(np.asarray(x_T).transpose(0, 3, 1, 2))
    with pytest.MonkeyPatch.context() as patch:
        module = __import__(type(pipeline).__module__, fromlist=["randn_tensor"])
        patch.setattr(module, "randn_tensor", lambda *_, **__: noise)
        images = pipeline(batch_size=8, num_inference_steps=10, output_type="np").images
    np.testing.assert_allclose(np.clip(got / 2 + 0.5, 0, 1), images, rtol=0, atol=1e-3)

    pipeline.scheduler.set_timesteps(10)
    x = noise  # again without the pipeline's last clipping to [0, 1]
    with torch.no_grad():
        for t in pipeline.scheduler.timesteps:
            x = pipeline.scheduler.step(pipeline.unet(x, t).sample, t, x).prev_sample
    want = x.numpy().transpose(0, 2, 3, 1)
    assert np.abs(got - want).max() <= 1e-3 * max(1, np.abs(want).max())
