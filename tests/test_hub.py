"""Models of the Hugging Face Hub: a small server, a cache made by hand, and what goes wrong.

The names of files and the errors without the package are tested everywhere; the rest needs it.
"""

import json
import sys
import warnings

import pytest
import safetensors.numpy

import ddim_jax as ddim
from ddim_jax.networks import unet
from ddim_jax.process import ScheduleConfig
from ddim_jax.weights import load_model, save_model, to_facts
from ddim_jax.weights.diffusers_config import unet_config, unet_settings
from ddim_jax.weights.hub import is_hub_name
from ddim_jax.weights.hub_files import Needed, needed
from ddim_jax.weights.state_dict import from_state_dict
from tests import hub_server
from tests.test_containers import EMA, SCHEDULER, STATE, STEM, THEIR_EMA, THEIRS, TINY, shards
from tests.tiny import assert_same

# What of a repository is needed.

GOOGLE = [  # as google/ddpm-cifar10-32 is
    *(".gitattributes", "README.md", "config.json", f"{STEM}.bin", f"{STEM}.safetensors"),
    *("images/generated_image_0.png", "model_index.json", "modeling_ddpm.py"),
    "scheduler_config.json",
]
PIPELINE = [
    *("README.md", "model_index.json", "scheduler/scheduler_config.json", "unet/config.json"),
    *(f"unet/{STEM}.safetensors", f"unet/{STEM}.fp16.safetensors", "samples/0099.png"),
    *("checkpoint-500/optimizer.bin", "checkpoint-500/unet_ema/config.json"),
    f"checkpoint-500/unet_ema/{STEM}.safetensors",
]
INDEXED = ["config.json", f"{STEM}.safetensors.index.json", f"{STEM}-00001-of-00001.safetensors"]
SETTINGS = ["unet/config.json", "scheduler/scheduler_config.json", "model_index.json"]
EMA_FOLDER = "checkpoint-500/unet_ema/"
NEEDED = {
    "google": (GOOGLE, {}, "", f"{STEM}.safetensors",
               ["config.json", "scheduler_config.json", "model_index.json"]),
    "pipeline": (PIPELINE, {}, "", f"unet/{STEM}.safetensors", SETTINGS),
    "variant": (PIPELINE, {"variant": "fp16"}, "", f"unet/{STEM}.fp16.safetensors", SETTINGS),
    "unet": (PIPELINE, {"subfolder": "unet"}, "unet/", f"unet/{STEM}.safetensors", SETTINGS),
    "average": (PIPELINE, {"subfolder": EMA_FOLDER[:-1]}, EMA_FOLDER,
                f"{EMA_FOLDER}{STEM}.safetensors", [f"{EMA_FOLDER}config.json", *SETTINGS[1:]]),
    "checkpoint of a run": (
        PIPELINE, {"subfolder": "checkpoint-500"}, "checkpoint-500/",
        f"{EMA_FOLDER}{STEM}.safetensors", [f"{EMA_FOLDER}config.json", *SETTINGS[1:]]),
    "file of weights": (PIPELINE, {"filename": f"unet/{STEM}.fp16.safetensors"},
                        f"unet/{STEM}.fp16.safetensors", f"unet/{STEM}.fp16.safetensors", SETTINGS),
    "ours": (["README.md", "m.safetensors", "m.ckpt"], {}, "m.safetensors", "m.safetensors", []),
    "checkpoint": (["README.md", "m.ckpt"], {}, "m.ckpt", "m.ckpt", []),
    "by name": (["a.pt", "x/b.pt"], {"filename": "b.pt", "subfolder": "x"}, "x/b.pt", "x/b.pt", []),
}  # fmt: skip


@pytest.mark.parametrize("what", NEEDED)
def test_only_the_needed_files(what):
    names, options, model, weights, settings = NEEDED[what]
    assert needed(names, **options) == Needed(model, settings, weights)


def test_an_index_is_told():
    need = needed(INDEXED)
    assert (need.weights, need.shards.form) == (INDEXED[1], "safetensors.index")


@pytest.mark.parametrize(
    ("names", "options", "error", "says"),
    [
        (GOOGLE, {"subfolder": "unet"}, FileNotFoundError, "no folder 'unet/'; it has .gitattri"),
        (GOOGLE, {"filename": "m.pt"}, FileNotFoundError, "no file 'm.pt'; it has"),
        (GOOGLE, {"variant": "fp16"}, ValueError, "no variant 'fp16'"),
        (["README.md"], {}, FileNotFoundError, "no model that is read here.* it has README.md"),
        ([], {}, FileNotFoundError, "it has no folder '' *"),
        (["a.pt", "b.ckpt"], {}, ValueError, "2 files of .* filename='a.pt', or --filename a.pt"),
        (["a.safetensors", "b.safetensors", "c.pt"], {}, ValueError, "2 files .* a.safetensors, b"),
        (["model.onnx", "vae/config.json"], {}, FileNotFoundError, "no model that is read here"),
    ],
)  # fmt: skip
def test_repositories_without_a_model(names, options, error, says):
    with pytest.raises(error, match=says):
        needed(names, **options)


def test_names_of_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    assert is_hub_name("google/ddpm-cifar10-32")
    for other in ("runs/mine", "a/b/c", "digits", "./a", "/a/b", "a/b.ckpt", tmp_path, "a/ b"):
        assert not is_hub_name(other)


def test_without_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(
        ModuleNotFoundError, match=r"no file or folder.* pip install 'ddim_jax\[hub\]'"
    ):
        load_model("google/ddpm-cifar10-32")


# With the package, and a server.

NOBODY = "http://127.0.0.1:9"  # is there


@pytest.fixture
def hub(tmp_path, monkeypatch):
    why = "needs the hub extra: pip install 'ddim_jax[hub]'"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        package = pytest.importorskip("huggingface_hub", reason=why)
        pytest.importorskip("huggingface_hub.constants", reason=why)
    monkeypatch.chdir(tmp_path)
    constants, served = package.constants, hub_server.Hub()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_PROGRESS_BARS", True)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with hub_server.serving(served) as address:
        reach(monkeypatch, package, address)
        served.package = package
        yield served


def reach(monkeypatch, package, address, offline=False):
    """What HF_ENDPOINT and HF_HUB_OFFLINE do when huggingface_hub is imported; 0.30 has copies."""
    from huggingface_hub import file_download, utils

    template = address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(package.constants, "ENDPOINT", address)
    monkeypatch.setattr(package.constants, "HF_HUB_OFFLINE", offline)
    for module in (package.constants, file_download):
        monkeypatch.setattr(module, "HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)
    getattr(utils, "reset_sessions", lambda: None)()


def text(content):
    return json.dumps(content).encode()


def repository(inner="unet/", beside="scheduler/", settings=None, scheduler=SCHEDULER):
    return {
        **{"README.md": b"-", "model_index.json": b"{}", "images/0.png": b"-"},
        f"{inner}config.json": text(settings or unet_settings(TINY)),
        f"{beside}scheduler_config.json": text(scheduler),
        f"{inner}{STEM}.safetensors": safetensors.numpy.save(THEIRS),
        f"{inner}{STEM}.bin": b"not read",
        f"{inner}{STEM}.fp16.safetensors": safetensors.numpy.save(THEIR_EMA),
    }


def test_a_pipeline_and_the_cache_of_it(hub, monkeypatch):
    hub.repositories["org/pipeline"] = repository()
    model = load_model("org/pipeline")
    assert_same(model.params, from_state_dict(STATE, TINY))
    assert hub.downloaded == [
        *("unet/config.json", "scheduler/scheduler_config.json", "model_index.json"),
        f"unet/{STEM}.safetensors",
    ]
    where = {"repository": "org/pipeline", "commit": hub_server.COMMIT}
    assert model.facts["hub"] == {**where, "file": f"unet/{STEM}.safetensors"}
    assert load_model("org/pipeline", revision="v1").facts["hub"]["commit"] == hub_server.COMMIT
    assert len(hub.downloaded) == 4  # once
    ema = load_model("org/pipeline", variant="fp16")
    assert_same(ema.params, from_state_dict(EMA, TINY))
    assert (len(hub.downloaded), ema.facts["variant"]) == (5, "fp16")

    hub.asked.clear()
    reach(monkeypatch, hub.package, NOBODY, offline=True)
    assert_same(load_model("org/pipeline").params, model.params)
    assert_same(load_model("org/pipeline", subfolder="unet").params, model.params)
    assert not hub.asked
    reach(monkeypatch, hub.package, NOBODY)
    assert_same(load_model("org/pipeline").params, model.params)


def test_other_repositories(hub, tmp_path):
    files, index = shards(count=2)
    flat = {name: data for name, data in repository("", "").items() if STEM not in name}
    sharded = {name: safetensors.numpy.save(tensors) for name, tensors in files.items()}
    hub.repositories["org/flat"] = {
        **flat,
        **sharded,
        f"{STEM}.safetensors.index.json": text(index),
    }
    assert_same(load_model("org/flat").params, from_state_dict(STATE, TINY))
    assert sorted(name for name in hub.downloaded if STEM in name) == sorted(
        [*files, f"{STEM}.safetensors.index.json"]
    )
    schedule = ScheduleConfig("cosine", 50)
    facts = to_facts(schedule, TINY, "v")
    apply_fn = ddim.predicts(unet.make_apply(TINY), "v")
    params = from_state_dict(EMA, TINY)
    mine = ddim.Model(apply_fn, params, schedule.build(), TINY, facts)
    save_model(tmp_path / "mine.safetensors", mine)
    data = (tmp_path / "mine.safetensors").read_bytes()
    hub.repositories["org/ours"] = {"README.md": b"-", "mine.safetensors": data}
    hub.repositories["org/both"] = {"a.safetensors": b"", "x/b.safetensors": data}
    again = load_model("org/ours")
    assert (again.prediction.kind, again.config) == ("v", TINY)
    assert_same(again.params, params)
    assert_same(load_model("org/both", subfolder="x").params, params)
    assert_same(load_model("org/both", filename="x/b.safetensors").params, params)
    elsewhere = load_model("org/ours", cache_dir=tmp_path / "other")
    assert_same(elsewhere.params, params)
    assert (tmp_path / "other" / "models--org--ours").is_dir()


def test_a_cache_made_by_hand(hub, tmp_path, monkeypatch):
    """As huggingface_hub lays it out, without having been there."""
    reach(monkeypatch, hub.package, NOBODY, offline=True)
    folder = tmp_path / "cache" / "models--org--hand"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(hub_server.COMMIT)
    for name, data in repository().items():
        path = folder / "snapshots" / hub_server.COMMIT / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    assert_same(load_model("org/hand").params, from_state_dict(STATE, TINY))
    with pytest.raises(
        ConnectionError, match="no variant 'bf16'.* plain weights(?s:.*)hf download"
    ):
        load_model("org/hand", variant="bf16")
    (folder / "snapshots" / hub_server.COMMIT / "unet" / f"{STEM}.safetensors").unlink()
    (folder / "snapshots" / hub_server.COMMIT / "unet" / f"{STEM}.bin").unlink()
    (folder / "snapshots" / hub_server.COMMIT / "unet" / f"{STEM}.fp16.safetensors").unlink()
    with pytest.raises(ConnectionError, match=r"org/hand(?s:.*)no model that is read here"):
        load_model("org/hand")


def test_gated_models_and_tokens(hub, monkeypatch):
    hub.repositories["org/gated"] = repository()
    hub.refusals["org/gated"] = (403, "GatedRepo")
    with pytest.raises(PermissionError, match=r"gated: accept its terms at \S*org/gated.*HF_TOKEN"):
        load_model("org/gated", token="bad")
    assert not hub.downloaded
    assert_same(load_model("org/gated", token="good").params, from_state_dict(STATE, TINY))


def test_settings_are_refused_before_the_weights_are_fetched(hub):
    settings = {**unet_settings(TINY), "_class_name": "UNet2DConditionModel"}
    hub.repositories["org/text"] = repository(settings=settings)
    with pytest.raises(ValueError, match="org/text on the Hub: .*UNet2DConditionModel"):
        load_model("org/text")
    assert not [file for file in hub.downloaded if STEM in file]
    latent = {"vqvae": ["diffusers", "VQModel"], "unet": ["diffusers", "UNet2DModel"]}
    hub.repositories["org/latent"] = {**repository(), "model_index.json": text(latent)}
    with pytest.raises(ValueError, match="a pipeline that needs vqvae too.*--subfolder unet"):
        load_model("org/latent")
    hub.repositories["org/flow"] = repository(scheduler={"_class_name": "FlowMatchEuler"})
    with pytest.raises(ValueError, match="org/flow on the Hub: .*_class_name is 'FlowMatchEuler'"):
        load_model("org/flow")
    assert not [file for file in hub.downloaded if STEM in file]
    assert load_model("org/latent", subfolder="unet").config == TINY


REFUSED = {
    "none": ("org/none", {}, FileNotFoundError, "no such file or folder here, and on the Hub none"),
    "revision": ("org/a", {"revision": "v9"}, FileNotFoundError, "has no revision 'v9'"),
    "folder": ("org/a", {"subfolder": "vae"}, FileNotFoundError, "org/a on the Hub: .*'vae/'"),
    "file": ("org/a", {"filename": "m.pt"}, FileNotFoundError, "org/a on the Hub: .*'m.pt'"),
    "variant": ("org/a", {"variant": "bf16"}, ValueError, "org/a on the Hub: .*variant 'bf16'"),
    "private": ("org/private", {}, FileNotFoundError, "public or yours.*HF_TOKEN"),
    "gated": ("org/gated", {}, PermissionError, "org/gated is gated"),
    "forbidden": ("org/no", {}, PermissionError, r"the Hub refuses org/no \(403\): give a token"),
    "broken": ("org/broken", {}, ConnectionError, r"it answers 500(?s:.*)hf download org/broken"),
    "gated files": ("org/listed", {}, PermissionError, "org/listed is gated: accept its terms"),
    "broken files": ("org/half", {}, ConnectionError, r"middle of it(?s:.*)hf download org/half"),
    "name": ("org/a--b", {}, ValueError, "neither a path here nor a name of the Hub"),
    "text": ("org/words", {}, FileNotFoundError, "no model that is read here.* README.md"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_refused(hub, what):
    hub.repositories |= {"org/a": repository(), "org/words": {"README.md": b"-"}}
    hub.refusals |= {"org/private": (401, "RepoNotFound"), "org/gated": (403, "GatedRepo")}
    hub.refusals |= {"org/no": (403, None), "org/broken": (500, None)}
    for repo, refusal in {"org/listed": (403, "GatedRepo"), "org/half": (400, None)}.items():
        hub.repositories[repo] = repository()
        hub.refusals[f"files of {repo}"] = refusal
    name, options, error, says = REFUSED[what]
    with pytest.raises(error, match=says):
        load_model(name, **options)
    assert not [file for file in hub.downloaded if STEM in file]


def test_not_reached_and_not_in_the_cache(hub, monkeypatch):
    reach(monkeypatch, hub.package, NOBODY)
    says = (
        r"no model 'org/a': .* cannot be reached .*, and in \S*cache: .*network, run\n"
        r"  hf download org/a --include '\*.json' --include '\*.safetensors' --include '\*.bin' "
        r"--revision v1 --local-dir a\nbring the folder here, and name 'a' in place of 'org/a'"
    )
    with pytest.raises(ConnectionError, match=says):
        load_model("org/a", revision="v1")
    with pytest.raises(
        ConnectionError, match="hf download org/a x/m.pt --local-dir a\n.*'a/x/m.pt'"
    ):
        load_model("org/a", subfolder="x", filename="m.pt")
    with pytest.raises(ConnectionError, match=r"'\*.json' --include 'unet/\*.safetensors'.*"):
        load_model("org/a", subfolder="unet")
    reach(monkeypatch, hub.package, NOBODY, offline=True)
    with pytest.raises(ConnectionError, match=r"reached \(.*[Oo]ffline"):
        load_model("org/a")


def test_the_commands_take_it(hub, capsys):
    from ddim_jax.cli.info import info
    from ddim_jax.cli.options import Source

    hub.repositories["org/pipeline"] = repository()
    source = Source(variant="fp16", revision="v1", ignore=None)
    info("org/pipeline", source)
    assert "repository: org/pipeline" in capsys.readouterr().out
    assert source.words() == ["--variant", "fp16", "--revision", "v1"]


def test_export_puts_it_on_the_hub(hub, monkeypatch, capsys, tmp_path):
    from ddim_jax.cli.export import Program, export
    from ddim_jax.cli.options import Source

    def run(out, **options):
        export("digits", tmp_path / out, Source(), Program(), **options)
        return capsys.readouterr().out

    new = {"diffusers": True, "push": "me/digits"}
    full = {"model_index.json": b"-", "README.md": b"-", ".gitattributes": b""}
    hub.repositories["me/full"] = full
    with pytest.raises(PermissionError, match="cannot write to me/digits: there is no token: give"):
        run("a", **new)
    monkeypatch.setenv("HF_TOKEN", "bad")
    with pytest.raises(
        PermissionError, match=r"cannot write to me/digits: .*\(401\): give a token"
    ):
        run("a", **new)
    monkeypatch.setenv("HF_TOKEN", "good")
    with pytest.raises(FileExistsError, match="me/full on the Hub holds model_index.json; choose"):
        run("a", diffusers=True, push="me/full")
    with pytest.raises(ValueError, match="--private is for --push"):
        run("a", diffusers=True, private=True)
    with pytest.raises(ValueError, match="not for a whole sampler"):
        run("a.stablehlo", push="me/digits")
    assert not (tmp_path / "a").exists()

    assert "me/digits: ddim-jax sample me/digits" in run("a", **new, private=True)
    assert hub.visibility == {"me/digits": "private"}
    assert_same(load_model("me/digits").params, load_model("digits").params)
    run("a.safetensors", push="me/full", overwrite=True)
    assert hub.repositories["me/full"].keys() == {*full, "a.safetensors"}
    assert load_model("me/full").image_shape == (8, 8, 1)


# Public models: their published config.json, in what differs from diffusers' defaults.

HO = {
    **{"attention_head_dim": None, "downsample_padding": 0, "flip_sin_to_cos": False},
    **{"freq_shift": 1, "norm_eps": 1e-6},
}
SIX = {
    "block_out_channels": [128, 128, 256, 256, 512, 512],
    "down_block_types": [*["DownBlock2D"] * 4, "AttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "AttnUpBlock2D", *["UpBlock2D"] * 4],
}
COURSE = {
    "block_out_channels": [64, 128, 128, 256],
    "down_block_types": [*["DownBlock2D"] * 2, *["AttnDownBlock2D"] * 2],
    "up_block_types": [*["AttnUpBlock2D"] * 2, *["UpBlock2D"] * 2],
}
THREE = {
    **{"block_out_channels": [32, 64, 64], "in_channels": 1, "out_channels": 1},
    "down_block_types": ["DownBlock2D", *["AttnDownBlock2D"] * 2],
    "up_block_types": [*["AttnUpBlock2D"] * 2, "UpBlock2D"],
}
PUBLISHED = {
    "google/ddpm-church-256": {**HO, **SIX, "sample_size": 256},
    "google/ddpm-celebahq-256": {**HO, **SIX, "sample_size": 256},
    "johnowhitaker/ddpm-butterflies-32px": {**COURSE, "sample_size": 32},
    "nathanReitinger/FASHION-diffusion-oneImage": {**THREE, "sample_size": 28},
}
NCSNPP = {
    **{"time_embedding_type": "fourier", "norm_num_groups": None, "center_input_sample": True},
    **{"mid_block_scale_factor": 1.41421356237, "sample_size": 256, "attention_head_dim": None},
    "block_out_channels": [128, 128, *[256] * 5],
    "down_block_types": [*["SkipDownBlock2D"] * 4, "AttnSkipDownBlock2D", *["SkipDownBlock2D"] * 2],
    "up_block_types": [*["SkipUpBlock2D"] * 2, "AttnSkipUpBlock2D", *["SkipUpBlock2D"] * 4],
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_settings_of_public_models(name):
    settings = PUBLISHED[name]
    config = unet_config({"_class_name": "UNet2DModel", **settings})
    assert config.image_shape[0] == settings["sample_size"]
    assert config.widths == tuple(settings["block_out_channels"])


def test_networks_of_other_processes_are_named():
    """google/ncsnpp-church-256, of the variance-exploding process."""
    with pytest.raises(ValueError, match="fourier.*variance-exploding"):
        unet_config({"_class_name": "UNet2DModel", **NCSNPP})
