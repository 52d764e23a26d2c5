import importlib
import json
import os
import re
import signal
import subprocess
import sys
import typing
import warnings

import jax
import numpy as np
import pytest
from PIL import Image

import ddim_jax as ddim
from ddim_jax import cli
from ddim_jax.cli.ways import Sampling, Spacing
from ddim_jax.generation.shards import iter_shards
from ddim_jax.networks import unet
from ddim_jax.networks.unet import abstract_params, count_params
from ddim_jax.pictures.images import grid, to_uint8
from ddim_jax.process import ScheduleConfig
from ddim_jax.storage.checkpoint import restore_config
from ddim_jax.storage.checkpoint_folder import saved_steps
from ddim_jax.storage.weights_file import write_safetensors
from ddim_jax.training import fitting
from ddim_jax.training.presets import PRESETS
from ddim_jax.weights import load_model, save_model, to_facts
from ddim_jax.weights.state_dict import to_state_dict
from tests import torch_writer
from tests.test_diffusers_format import write_folder
from tests.tiny import unet_model

pytestmark = pytest.mark.usefixtures("one_trace")


@pytest.fixture
def command(monkeypatch, tmp_path, capsys, one_device):
    """Runs `ddim-jax …` in an empty folder; returns what it printed, or raises SystemExit."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)
    monkeypatch.setattr(signal, "signal", lambda *_: signal.SIG_DFL)  # pytest keeps its own
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "keep the test's own")
    monkeypatch.delenv("DDIM_JAX_DATA", raising=False)

    def run(line):
        monkeypatch.setattr("sys.argv", ["ddim-jax", *line.split()])
        cli.main()
        return capsys.readouterr().out

    return run


SMALL = (
    "--model.channels 32 --model.multipliers 1 --model.attention-resolutions --train.batch-size 8"
)
OFTEN = "--train.log-every 2 --train.checkpoint-every 2 --train.no-cosine-decay"
TUNE = f"--train.batch-size 8 --train.sample-every 0 {OFTEN}"
SHORT = f"{SMALL} {OFTEN}"


SMALLEST = f"{SHORT} --model.num-blocks 1 --train.sample-every 0"


def test_train_then_sample(command, tmp_path):
    """The quick part of what follows."""
    said = command(f"train digits --out run {SMALLEST} --train.num-updates 2")
    assert "1,797 images" in said
    with pytest.raises(SystemExit, match="already holds a run; resume it"):
        command(f"train digits --out run {SMALLEST} --train.num-updates 4")
    with pytest.raises(SystemExit, match=r"train.learning_rate: saved 0.003, now 0.5"):
        command(f"train digits --out run --resume must {SMALLEST} --train.learning-rate 0.5")
    said = command("info run --verify")
    assert said.count("every digest matches") == 1
    assert "preset: digits" in said
    command("sample run --num-images 3 --steps 2 --out drawn.png")
    with Image.open("drawn.png") as image:
        assert json.loads(image.text["ddim_jax"])["model"] == "run"


@pytest.mark.slow
def test_train_resume_sample_info(command, tmp_path):
    said = command(f"train digits --out run {SHORT} --train.num-updates 2")
    assert "1,797 images" in said
    assert (tmp_path / "run" / "loss.png").stat().st_size > 1000
    with pytest.raises(SystemExit, match="already holds a run; resume it"):
        command(f"train digits --out run {SHORT} --train.num-updates 4")
    with pytest.raises(SystemExit, match=r"train.learning_rate: saved 0.003, now 0.5"):
        command(
            f"train digits --out run --resume must {SHORT} --train.num-updates 4 "
            "--train.learning-rate 0.5"
        )
    command(f"train digits --out run --resume auto {SHORT} --train.num-updates 4")
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [2, 4]
    said = command("info run --verify")
    assert said.count("every digest matches") == 2
    assert said.index("loss:") < said.index("checkpoints:") < said.index("configuration:")
    assert "preset: digits" in said
    assert "step: 4 of 4" in said
    assert re.search("loss: [0-9.]+ [▁-█]{2} [0-9.]+", said)
    assert len(list((tmp_path / "run" / "samples").iterdir())) == 2
    command("sample run --num-images 3 --steps 2 --out drawn.png")
    command("export run half.safetensors --dtype bfloat16")
    assert ddim.load_model("half.safetensors").config.dtype == "bfloat16"
    command("export half.safetensors run.safetensors --dtype float32")
    with pytest.raises(SystemExit, match=r"run\.safetensors exists"):
        command("export run run.safetensors")
    command("sample run.safetensors --num-images 3 --steps 2 --out again.png")
    command("export run folder --diffusers --step 2")
    assert (tmp_path / "folder" / "unet" / "config.json").exists()
    command("sample folder --num-images 3 --steps 2 --out third.png")
    with pytest.raises(SystemExit, match="folder exists"):
        command("export run folder --diffusers --overwrite")
    assert (tmp_path / "drawn.png").read_bytes()[-500:] == (tmp_path / "again.png").read_bytes()[
        -500:
    ]


def test_sample_the_shipped_model(command, tmp_path):
    command("sample digits --num-images 5 --steps 4 --batch-size 2 --eta 0.5")
    path = tmp_path / "digits-S4-eta0.5-seed0.png"
    with Image.open(path) as image:
        facts = json.loads(image.text["ddim_jax"])
    assert facts == {
        **{"model": "digits", "steps": 4, "eta": 0.5, "spacing": "linear"},
        **{"method": "ddim", "tau": None, "clip": False, "seed": 0},
        **{"label": None, "labels": None, "guidance": None, "guidance_interval": None},
        "as_stored": False,
    }
    with pytest.raises(SystemExit, match="exists; choose another --out, or pass --overwrite"):
        command("sample digits --num-images 5 --steps 4 --eta 0.5")


@pytest.mark.slow
def test_another_batch_size_draws_the_same_and_any_method(command, tmp_path):
    path = tmp_path / "digits-S4-eta0.5-seed0.png"
    command("sample digits --num-images 5 --steps 4 --batch-size 2 --eta 0.5")
    with Image.open(path) as image:
        pixels = np.asarray(image)
    command("sample digits --num-images 5 --steps 4 --eta 0.5 --batch-size 5 --overwrite")
    with Image.open(path) as image:  # another batch size, the same images
        assert np.abs(np.asarray(image).astype(int) - pixels).max() <= 1
    command("sample digits --num-images 1 --steps 3 --method ddpm-large --clip --out hat.png")


def test_sample_as_a_diffusers_folder_says(command, tmp_path):
    scheduler = {"_class_name": "PNDMScheduler", "skip_prk_steps": True, "novel": 1}
    folder = write_folder(tmp_path / "theirs", scheduler=scheduler)
    draw = "sample theirs --num-images 2 --steps 3 --batch-size 2"
    assert "drawn by ddim, and not as theirs says itself: --as-stored does" in command(draw)
    with pytest.raises(SystemExit, match="novel is unknown; .*make_sampler.*without --as-stored"):
        command(f"{draw} --as-stored")
    del scheduler["novel"]
    (folder / "scheduler_config.json").write_text(json.dumps(scheduler))
    said = command(f"{draw} --as-stored --out all.png --gif all.gif")  # 4 calls for 3 steps
    assert "all.gif: 4 frames of 2 images, S = 3, as stored, seed 0" in said
    with Image.open(tmp_path / "all.png") as image:
        assert json.loads(image.text["ddim_jax"])["as_stored"]
    command(f"{draw} --as-stored")
    assert (tmp_path / "theirs-S3-as_stored-seed0.png").exists()
    for option, says in (
        ("--clip", "--as-stored takes clip from the model"),
        ("--method unipc-2", "--as-stored takes method from"),
        ("--eta 1", "eta = 1.0 goes with DDIMScheduler"),
    ):
        with pytest.raises(SystemExit, match=says):
            command(f"{draw} --as-stored {option} --out other.png")
    with pytest.raises(
        SystemExit, match="digits does not say how it is sampled: leave out --as-st"
    ):
        command("sample digits --as-stored --out other.png")
    exported = command("export theirs t.stablehlo --steps 1 --platforms cpu")
    assert "drawn by ddim, and not as theirs says itself" in exported
    drawn = command("generate theirs --out set --num-images 2 --batch-size 2 --steps 3 --as-stored")
    assert "set: 2 images, S = 3, as stored, seed 0" in drawn
    settings = json.loads((tmp_path / "set" / "settings.json").read_text())
    assert (settings["method"], settings["tau"]) == ("as-stored", [1, 334, 667])
    (shard,) = iter_shards(tmp_path / "set")
    with Image.open(tmp_path / "theirs-S3-as_stored-seed0.png") as image:
        tile = np.asarray(image)
    np.testing.assert_array_equal(grid(shard, scale=8), tile)


@pytest.mark.slow
def test_fine_tune_a_saved_model_with_classes(command, tmp_path):
    network = unet.UNetConfig(8, 1, 32, (1,), num_blocks=1, attention_resolutions=())
    facts = to_facts(ScheduleConfig("cosine", 10), network, "x_0")
    apply_fn, params = unet.build(network, jax.random.key(0))
    own = ddim.Model(
        ddim.predicts(apply_fn, "x_0"), params, ddim.cosine_schedule(10), network, facts
    )
    save_model(tmp_path / "m.safetensors", own)
    line = f"train digits --init m.safetensors --model.num-classes 10 {TUNE} --out tuned"
    said = command(f"{line} --train.num-updates 2")
    assert "starting from m.safetensors (" in said
    assert "with a new table of 10 classes, each at first as without a label" in said
    began = restore_config(tmp_path / "tuned" / "checkpoints", 2)
    with pytest.raises(SystemExit, match="was begun from m.safetensors .*, not from digits "):
        command(f"{line} --train.num-updates 4 --resume must".replace("m.safetensors", "digits"))
    # Network, schedule and prediction are the run's, of which the preset knows nothing.
    command(f"train digits {TUNE} --out tuned --train.num-updates 4 --resume must")
    went_on = restore_config(tmp_path / "tuned" / "checkpoints", 4)
    assert {**went_on, "train": 0} == {**began, "train": 0}
    assert load_model(tmp_path / "tuned").config.num_classes == 10


@pytest.mark.slow
def test_images_of_ones_own_for_some_minutes(command, tmp_path, monkeypatch):
    monkeypatch.setattr(fitting, "time_update", lambda *_: 0.125)
    small = "--model.multipliers 1 --train.batch-size 8 --train.sample-every 0"
    line = f"train images --data.name digits {small} --out run"
    said = command(f"{line} --minutes 0.025 --data.holdout 0.1")
    assert "8×8×1 on cpu: a network of" in said
    assert "12 updates of 8 images" in said
    saved = restore_config(tmp_path / "run" / "checkpoints")
    assert (saved["train"]["num_updates"], saved["train"]["cosine_decay"]) == (12, True)
    assert (tmp_path / "run" / "loss.png").stat().st_size > 1000
    monkeypatch.setattr(fitting, "time_update", lambda *_: 1 / 0)  # not timed again
    command(f"{line} --minutes 0.025 --data.holdout 0.1 --resume must")
    command(f"{line} --data.holdout 0.1 --resume auto")
    with pytest.raises(SystemExit, match=r"data.holdout: saved 180, now nothing"):
        command(f"{line} --resume must")
    with pytest.raises(SystemExit, match=r"num_updates: saved 12, now 20\n(.|\n)*rate.* --init "):
        command(f"{line} --data.holdout 0.1 --train.num-updates 20 --resume must")


def test_labels_that_are_asked_for_are_learned_or_declined(command, tmp_path):
    for number, kind in enumerate(("cats", "dogs")):
        (tmp_path / "pets" / kind).mkdir(parents=True)
        Image.new("L", (8, 8), 90 * number).save(tmp_path / "pets" / kind / "a.png")
    line = "train images --data.name pets --dry-run"
    with pytest.raises(SystemExit, match="does not learn: add --model.num-classes 2, or None"):
        command(f"{line} --data.labels folders")
    for inside in ("pets", "pets/cats/run"):
        with pytest.raises(
            SystemExit, match="lies in the pictures to learn from, pets, .* outside"
        ):
            command(f"{line} --out {inside}")
    for given in ("2", "None"):
        said = command(f"{line} --data.labels folders --model.num-classes {given}")
        assert f"num_classes: {given}" in said
    with pytest.raises(SystemExit, match=r"for 3 classes, pets has 2: set .*--model.num-classes 2"):
        command(f"{line} --data.labels folders --model.num-classes 3")
    with pytest.raises(SystemExit, match=r"pets has no labels: say where they are.*--data.labels"):
        command(f"{line} --model.num-classes 2")


def test_names_say_the_method_and_its_eta():
    given = [("ddim", 0.0), ("unipc-2", 0.0), ("dpm-solver-2", 0.5), ("mine:early", 0.0)]
    sampling = [Sampling(method=method, eta=eta) for method, eta in given]
    stems = ("eta0", "unipc-2", "dpm-solver-2-eta0.5", "mine.early")
    assert [v.stem for v in sampling] == [f"-S50-{stem}-seed0" for stem in stems]
    assert str(sampling[2]) == "S = 50, dpm-solver-2, eta = 0.5, seed 0"


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.slow] * (name not in ("digits", "cifar10")))
        for name in PRESETS
        if name != "images"  # it has no data of its own
    ],
)
def test_dry_run_of_every_preset(command, tmp_path, name):
    said = command(f"train {name} --dry-run --train.seed 12")
    parameters = count_params(abstract_params(PRESETS[name]().model))
    assert f"parameters: {parameters:,}" in said
    assert "seed: 12" in said
    assert ("\nchecked: 1,797 images" if name.startswith("digits") else "\nnot checked, as") in said
    assert list(tmp_path.iterdir()) == []


def test_published_parameter_counts():
    counts = {n: count_params(abstract_params(make().model)) for n, make in PRESETS.items()}
    assert counts["cifar10"] == 35_746_307
    assert counts["celeba64"] == 78_700_803
    assert counts["lsun256"] == 113_673_219


def test_presets_say_command_hardware_and_score():
    for name, make in PRESETS.items():
        assert f"`ddim-jax train {name}" in make.__doc__
        assert "Hardware:" in make.__doc__
        assert re.search("[Ss]core", make.__doc__)
        assert make().name == name


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("sample nothing", "no model 'nothing'.*shipped model.*digits"),
        ("sample digits --steps 1001", "S = 1001 and T = 1000"),
        ("sample digits --eta -1", "eta must be >= 0"),
        ("sample digits --eta 40", "too large"),
        ("sample nothing --eta -1", "eta must be >= 0"),  # before it looks for the model
        ("sample nothing --steps 0", "--steps must be at least 1"),
        ("sample nothing --out a.jpg", "must end in .png"),
        ("sample nothing --label 1 --labels all", "not both"),
        ("sample nothing --guidance 2", "--guidance is towards a class"),
        ("generate nothing --out a --batch-size 7", "must divide shard_size"),
        ("export nothing m.pt", "one .safetensors file, .* got m.pt: name it m.safetensors"),
        ("export nothing m", "name it m.safetensors"),
        ("export nothing no/m.safetensors", "there is no folder no for m.safetensors"),
        ("train digits --model.image-size 16 --dry-run", "the network takes"),
        ("train digits --train.fsdp 3 --dry-run", "fsdp must divide the number of devices, 1"),
        ("train digits --resume must --dry-run", "no checkpoint to resume from"),
        ("train digits --train.fsdp 3 --dry-run", "fsdp must divide"),
        ("train digits --init nothing", "no model 'nothing'"),
        ("train digits --init digits --model.channels=64", "model.channels = 32, asked for is 64"),
        ("train digits --init digits --schedule.kind cosine", "schedule.kind = 'linear', asked"),
        ("train digits --init digits --train.prediction eps", "train.prediction = 'v', asked"),
        ("train digits --init digits --model.num-classes 9", "for 9 classes, digits has 10: set"),
        ("train digits --init digits --init-as.step 3", "step=3 is for a run folder"),
        ("train digits --init-as.step 3", "--init-as says how to read --init: give --init too"),
        ("train digits --init digits --data.resize 16", "bring them there with --data.resize 8"),
        ("train digits --data.holdout 1797", "leave at least one to learn from"),
        ("train digits --wandb one two", "--wandb takes one project, got one two"),
        ("train digits --wandb a/b", "no name for a W&B project: 'a/b'"),
        ("train images", "images trains on images of your own: give --data.name DIR"),
        ("train images --data.name digits --data.resize 33", "33×33 can be halved 0 times"),
        ("train images --data.name digits --minutes 0", "--minutes must be positive"),
        ("train images --minutes 1 --train.num-updates 9", "give one of them, not both"),
        ("sample nothing --method cubic", "unknown method 'cubic'; choose ddim, "),
        ("sample nothing --method no_such:f", "No module named 'no_such'\n"),
        ("sample nothing --method ddpm --eta 0.5", "'ddpm' has no eta"),
        (
            "sample nothing --method unipc-2 --eta 0.5",
            "ddim and dpm-solver-2; 'unipc-2' has no eta",
        ),
        ("sample nothing --tau 1,x", "--tau takes whole numbers"),
        ("sample digits --tau " + "1," * 200, "tau must increase strictly, got 1 then 1"),
        ("sample nothing --method math:pi", "math:pi must be a function of no argument"),
        ("sample nothing --method os:getcwd", "os:getcwd must return a method"),
        ("sample digits --tau 10,5", "tau must increase strictly"),
        ("sample nothing --tau 1,5 --steps 3", "not both"),
        ("sample digits --seed 4294967296", r"--seed must be in 0..2\*\*32 - 1"),
        ("export digits new --diffusers --float16", "--float16 is for a file"),
        ("export digits new --diffusers --dtype bfloat16", "--dtype is for a file"),
        ("export digits no/such.safetensors", "there is no folder no for such.safetensors"),
        ("sample digits --num-images 0", "at least one image"),
        ("sample digits --out drawn.jpg", "must end in .png"),
        ("sample digits --seed 99999999999999999999", "--seed must be in"),
        ("sample digits --step 3", "step"),
        ("sample digits --config cats", "cats"),
        ("train cifar10 --data-dir nowhere", "no data set 'cifar10'.*tfds build cifar10"),
        ("train digits --model.image-size 16 --out r", "the network takes"),
        ("train digits --data.split test --out r", "one split, 'train'"),
        ("info .", "not a run"),
        ("train digits --num-processes 2 --out r", "process_id go together"),
        ("generate digits --process-id 0 --out r", "process_id go together"),
        ("info digits --verify", "--verify is for .* a run folder"),
    ],
)
def test_errors_are_messages(command, line, says):
    with pytest.raises(SystemExit, match=f"(?s)^ddim-jax: error: .*{says}"):
        command(line)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("train digits --train.nope 3", "Unrecognized options"),
        ("train cats", "cats"),
        ("train digits --train.num-updates many", "many"),
        ("train digits --train.num-updates -4", "at least 1, got -4"),
        ("train digits --model.channels 33", "multiple of 8"),
        ("train digits --model.image-size 9", "multiple of 2"),
        ("nonsense", "no command 'nonsense' usage"),
        ("trian digits", "no command 'trian'; did you mean train?"),
        ("--verison", "did you mean --version?"),
        ("", "say which command"),
        ("", "train Train a preset"),
        ("sample nothing --spacing cubic", "('linear', 'quadratic',"),
        ("sample digits --stepz 3", "Perhaps you meant: --step"),
    ],
)
def test_usage_errors_name_what_is_wrong(command, line, says, capsys):
    with pytest.raises(SystemExit) as stop:
        command(line)
    assert stop.value.code == 2
    said = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert says in said
    assert "dummy" not in said


def test_help_lists_every_command_and_is_quick(command):
    said = command("--help")
    for name, (place, line) in cli.COMMANDS.items():
        assert f"{name}  " in said
        module, function = place.split(":")
        doc = getattr(importlib.import_module(module), function).__doc__
        assert doc.splitlines()[0] == line
        assert line in said
    assert f"ddim_jax {ddim.__version__}" in command("--version")
    heavy = "{'tyro', 'flax', 'optax', 'orbax', 'grain', 'sklearn', 'tensorflow_datasets'}"
    code = f"from ddim_jax.cli import main; main(); import sys; print({heavy} & set(sys.modules))"
    child = [sys.executable, "-c", code, "--help"]
    assert subprocess.run(child, capture_output=True, text=True).stdout == said + "set()\n"


def test_a_file_that_is_no_tau(command, tmp_path):
    (tmp_path / "t.npy").write_bytes(b"no array")
    (tmp_path / "t.txt").write_bytes(b"\xff1")
    for name in ("t.npy", "t.txt"):
        with pytest.raises(SystemExit, match=f"--tau takes whole numbers.* got '{name}'"):
            command(f"sample nothing --tau {name}")


def test_the_spacings_are_those_of_timesteps():
    with pytest.raises(ValueError, match="unknown spacing") as error:
        ddim.timesteps(1000, 10, "cubic")
    known = re.findall("'([a-z]+)'", str(error.value).partition("choose")[2])
    assert list(typing.get_args(Spacing)) == known


def test_foreign_weights_are_refused(command, tmp_path):
    (tmp_path / "foreign.safetensors").write_bytes(b"not safetensors at all")
    with pytest.raises(SystemExit, match="not an intact safetensors file"):
        command("sample foreign.safetensors")
    (tmp_path / "e").mkdir()
    (tmp_path / "e" / "config.json").write_text('{"freq_shift": "a"}')
    weights = tmp_path / "e" / "diffusion_pytorch_model.safetensors"
    write_safetensors(weights, {"conv_in.weight": np.zeros((4, 3, 3, 3), "f4")}, {})
    with pytest.raises(SystemExit, match="(?s)error: e: .*freq_shift is .a., not a number"):
        command("sample e")
    (tmp_path / "empty" / "checkpoints").mkdir(parents=True)
    with pytest.raises(SystemExit, match="is empty, no checkpoint"):
        command("sample empty")


def test_weights_of_another_network_are_refused(tmp_path):
    model = ddim.load_model("digits")
    from ddim_jax.storage.weights_file import save_weights

    facts = {**model.facts, "model": {**model.facts["model"], "channels": 64}}
    save_weights(tmp_path / "odd.safetensors", model.params, facts)
    with pytest.raises(ValueError, match="odd"):
        ddim.load_model(tmp_path / "odd.safetensors")
    save_weights(tmp_path / "bare.safetensors", model.params, {"model": {}})
    with pytest.raises(ValueError, match="no model and schedule"):
        ddim.load_model(tmp_path / "bare.safetensors")


def test_a_signal_ends_the_command_with_its_own_code(command, tmp_path, monkeypatch, capsys):
    from ddim_jax.training.run_folder import StopSignals

    monkeypatch.setattr(StopSignals, "requested", lambda self, step: step == 1)
    with pytest.raises(SystemExit) as stop:
        command(f"train digits --out run {SMALLEST} --train.num-updates 4")
    assert stop.value.code == 75
    assert "stopped by a signal at step 1, saved in run" in capsys.readouterr().err
    assert saved_steps(tmp_path / "run" / "checkpoints")[-1] == 1


def test_generate_many_images(command, tmp_path, monkeypatch):
    line = "generate digits --out many --num-images 12 --steps 2 --batch-size 2 --shard-size 4"
    assert "12 images" in command(line)
    names = {p.name for p in (tmp_path / "many").iterdir()}
    assert names == {"settings.json", *(f"images-0000{i}.npy" for i in range(3))}
    command(line)  # finished: nothing to do
    with pytest.raises(
        SystemExit, match="--blocks must be 0, or from 2 to half of the 12 images in many, got 20"
    ):
        command("evaluate many --data digits")
    with pytest.raises(SystemExit, match="eta: saved 0.0, now 0.5"):
        command(line + " --eta 0.5")
    said = command("evaluate many --data digits --blocks 0")
    assert re.match(r"FD-pixels [0-9.]+, KD-pixels .*, precision-pixels .*\(12 samples\)", said)
    reference = tmp_path / "digits-train-pixels.npz"
    assert reference.exists()
    with pytest.raises(SystemExit, match="pixels, .*, got 'fid'"):
        command("evaluate many --data digits --extractor fid")
    with pytest.raises(
        SystemExit, match=r"many holds images \(8, 8, 1\), digits \(4, 4, 1\): name"
    ):
        command("evaluate many --data digits --blocks 0 --resize 4 --reference small.npz")
    monkeypatch.chdir(tmp_path / "many")
    assert command(f"evaluate . --data digits --blocks 0 --reference {reference}") == said
    monkeypatch.chdir(tmp_path)
    assert not (tmp_path / "small.npz").exists()  # said before the data were read
    assert "14 images" in command(line.replace("12", "14"))
    assert [len(shard) for shard in iter_shards("many")] == [4, 4, 4, 2]


def test_names_of_the_users_own(command, tmp_path, monkeypatch):
    """A data set and a method of a file of the user's; preset and extractor in what follows."""
    (tmp_path / "its_own.py").write_text(MINE)
    monkeypatch.syspath_prepend(tmp_path)
    said = command("train digits --dry-run --data.name its_own:squares")
    assert "100 images" in said
    ddim.save_model("m.safetensors", unet_model())
    command("sample m.safetensors --steps 3 --num-images 2 --method its_own:early --out a.png")
    with Image.open("a.png") as image:
        assert json.loads(image.text["ddim_jax"])["method"] == "its_own:early"


@pytest.mark.slow
def test_what_a_user_adds_goes_by_its_name(tmp_path):
    """A method, a data set, an extractor and a preset in one file of the user's, in one process."""
    (tmp_path / "mine.py").write_text(MINE)
    code = """if True:
        import sys
        from ddim_jax.cli import main
        for line in sys.argv[1:]:
            sys.argv = ["ddim-jax", *line.split()]
            main()
    """
    lines = [
        "train mine:tiny --out run --data.name mine:squares",
        "sample run --steps 3 --num-images 2 --method mine:early --out a.png",
        "generate run --out many --num-images 8 --steps 2 --batch-size 8 --shard-size 8",
        "evaluate many --data mine:squares --extractor mine:quarters --blocks 0",
    ]
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join([os.getcwd(), str(tmp_path)])}
    done = subprocess.run(
        [sys.executable, "-c", code, *lines],
        cwd=tmp_path,
        env=environ,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "100 images" in done.stdout
    assert "FD-quarters" in done.stdout
    assert (tmp_path / "a.png").exists()


MINE = """
import dataclasses
import numpy as np
import ddim_jax as ddim
from ddim_jax.data import Dataset
from ddim_jax.evaluation import Extractor
from ddim_jax.training import PRESETS

def early():
    return ddim.ddim()

def squares(split, transform):
    def read(indices):
        rows = np.arange(8) <= (indices % 4)[:, None]
        return 255 * (rows[:, :, None, None] & rows[:, None, :, None]).astype(np.uint8), indices % 4
    return Dataset("squares", split, 100, (8, 8, 1), 4, {"name": "squares"}, read)

def quarters():
    def apply(images):
        return images.reshape(len(images), 2, 4, 2, 4, 1).mean((2, 4, 5)).reshape(-1, 4) / 255
    return Extractor("quarters", 4, "", "v / 255, averaged over quarters", apply)

def tiny():
    "Command: none. Hardware: none. Score: none."
    digits = PRESETS["digits"]()
    model = dataclasses.replace(digits.model, channels=32, multipliers=(1,))
    train = dataclasses.replace(digits.train, batch_size=8, num_updates=2, sample_every=0)
    return dataclasses.replace(digits, model=model, train=train)
"""


def test_without_the_training_extras(command, tmp_path, monkeypatch):
    for name in ("ddim_jax.cli.train", "ddim_jax.cli.evaluate", "ddim_jax.storage.checkpoint"):
        monkeypatch.setitem(sys.modules, name, None)  # importing it is a ModuleNotFoundError
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    for line in ("train digits", "evaluate many --data digits", "sample run"):
        with pytest.raises(SystemExit, match=r"in a checkout, pip install '\.\[train\]'"):
            command(line)
    assert "train" in command("--help")


def test_data_commands(command):
    assert "digits" in command("data list").split()
    with pytest.raises(SystemExit, match="pip install tensorflow"):
        command("data prepare cifar10")
    with pytest.raises(SystemExit, match="say which data set to prepare"):
        command("data prepare")


def drawn_by(model, count):
    """What the commands are to draw, seed 0, S = 3, η = 0."""
    key = jax.random.split(jax.random.key(0))[0]
    x_T = ddim.initial_noise(key, count, (8, 8, 1))
    return ddim.make_sampler(model, [333, 666, 1000])(x_T)


def differ_by_rounding(a, b):
    return np.abs(np.asarray(a).astype(int) - np.asarray(b).astype(int)).max() <= 1


@pytest.mark.parametrize("prediction", [pytest.param("x_0", marks=pytest.mark.slow), "v"])
def test_every_command_knows_what_the_network_predicts(command, tmp_path, prediction):
    model = unet_model(prediction)
    ddim.save_model("m.safetensors", model)
    command("export m.safetensors folder --diffusers")
    command("export folder again.safetensors")
    expected = drawn_by(model, 12)
    for name in ("m.safetensors", "folder", "again.safetensors"):
        assert f"\nprediction: {prediction}\n" in command(f"info {name}")
    for name in ("folder", "again.safetensors"):
        command(f"sample {name} --num-images 4 --batch-size 12 --steps 3 --out d.png --overwrite")
        with Image.open("d.png") as image:
            assert differ_by_rounding(image, grid(expected[:4], scale=8))
    command("generate again.safetensors --out many --num-images 12 --batch-size 10 --steps 3")
    assert differ_by_rounding(next(iter_shards("many")), to_uint8(expected))
    settings = json.loads((tmp_path / "many" / "settings.json").read_text())
    assert settings["model"]["prediction"] == prediction
    assert "(12 samples)" in command("evaluate many --data digits --blocks 0")


def test_cifar10_is_compared_with_what_ships(command, tmp_path):
    """The data are not there; of classes of it nothing ships."""
    ddim.save_model("m.safetensors", unet_model("v", image_size=32, in_channels=3, num_classes=10))
    command(
        "generate m.safetensors --out many --num-images 4 --batch-size 4 --steps 1 --labels all"
    )
    line = "evaluate many --data cifar10 --extractor resnet56 --blocks 2"
    said = command(line)
    assert "the data are not at hand: compared with the statistics that ship\nFD-ResNet56" in said
    assert "(4 samples)" in said
    for more in ("--label 3", "--split test", "--resize 32"):
        with pytest.raises(SystemExit, match="no data set 'cifar10'"):
            command(f"{line.replace('--blocks 2', '--blocks 0')} {more}")


def test_what_a_pytorch_file_does_not_say_is_given(command, tmp_path):
    model = unet_model("v")
    (tmp_path / "m.ckpt").write_bytes(torch_writer.saved(to_state_dict(model.params)))
    with pytest.raises(SystemExit, match="neither the image size nor the noise schedule"):
        command("info m.ckpt")
    given = "m.ckpt --image-size 8 --schedule cosine --prediction v"
    assert "kind: cosine" in command(f"info {given}")
    command(f"sample {given} --num-images 12 --batch-size 12 --steps 3 --out drawn.png")
    with Image.open("drawn.png") as image:
        assert differ_by_rounding(image, grid(drawn_by(model, 12), scale=8))
    command(f"generate {given} --out many --num-images 2 --batch-size 2 --steps 3")
    command(f"export {given} --dtype bfloat16 m.safetensors")
    again = ddim.load_model("m.safetensors")
    assert (again.prediction.kind, again.config.dtype) == ("v", "bfloat16")


@pytest.mark.slow
def test_a_model_of_classes_draws_the_class_that_is_asked_for(command, tmp_path):
    model = unet_model(channels=64, num_classes=3)  # in groups of one channel a label would be lost
    model.params["label_embedding"] *= 10  # or random weights hardly see it
    ddim.save_model("m.safetensors", model)
    drawing = "m.safetensors --num-images 4 --steps 3"
    with pytest.warns(
        UserWarning, match=r"3 classes, does not say .* asked for none: .* \(--label, "
    ):
        command(f"sample {drawing} --out none.png")
    key = jax.random.split(jax.random.key(0))[0]
    x_T = ddim.initial_noise(key, 4, (8, 8, 1))

    @jax.jit
    def expected(labels, guidance):
        def network(x, t, y):
            return model.apply_fn(model.params, x, t, labels=y)

        guided = ddim.classifier_free_labels(network, labels, 3, guidance)
        return ddim.sample(guided, x_T, model.schedule, [333, 666, 1000])

    pictures = {}
    for options, labels, guidance in [
        ("--label 2", [2, 2, 2, 2], 1.0),
        ("--label 2 --guidance 4", [2, 2, 2, 2], 4.0),
        ("--labels all", [0, 1, 2, 0], 1.0),
        ("--label 3", [3, 3, 3, 3], 1.0),
    ]:
        command(f"sample {drawing} {options} --out d.png --overwrite")
        wanted = expected(np.int32(labels), guidance)
        with Image.open("d.png") as image:
            pictures[options] = np.asarray(image)
        assert differ_by_rounding(pictures[options], grid(wanted, scale=8))
        folder = re.sub("[- ]", "", options)
        command(f"generate {drawing} {options} --out {folder}")
        assert differ_by_rounding(next(iter_shards(folder)), to_uint8(wanted))
    assert not differ_by_rounding(pictures["--label 2"], pictures["--label 2 --guidance 4"])
    assert not differ_by_rounding(pictures["--label 2"], pictures["--labels all"])
    with Image.open("none.png") as image:
        np.testing.assert_array_equal(np.asarray(image), pictures["--label 3"])
    with pytest.raises(SystemExit, match=r"a class in 0\.\.2, 3 or 'none' for none"):
        command(f"sample {drawing} --label 4")


def test_oblong_pictures_and_those_that_are_none(command, tmp_path):
    ddim.save_model("oblong.safetensors", unet_model(image_size=(8, 16)))
    command("sample oblong.safetensors --num-images 1 --steps 2 --out d.png")
    with Image.open("d.png") as image:
        assert image.size == (16 * 8 + 2, 8 * 8 + 2)
    command("generate oblong.safetensors --out many --num-images 2 --steps 2")
    assert next(iter_shards("many")).shape == (2, 8, 16, 1)
    (tmp_path / "m.ckpt").write_bytes(torch_writer.saved(to_state_dict(unet_model().params)))
    said = command("info m.ckpt --image-size 8 16 --schedule linear")
    assert "image_size: (8, 16)" in said
    ddim.save_model("four.safetensors", unet_model(in_channels=4))
    with pytest.raises(SystemExit, match="images of 4 channels are no PNG"):
        command("sample four.safetensors")
    (tmp_path / "file").write_text("x")
    with pytest.raises(SystemExit, match="file/d.png cannot be written: .*file is a file"):
        command("sample nothing --out file/d.png")


HEARS = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"


def child(line, **environ):
    """`ddim-jax LINE` as a process of its own, which hears Ctrl-C even if the tests do not."""
    return subprocess.Popen(
        [sys.executable, "-c", f"{HEARS}; from ddim_jax.cli import main; main()", *line.split()],
        stderr=subprocess.PIPE,
        env={**os.environ, "JAX_PLATFORMS": "cpu", **environ},
        text=True,
    )


@pytest.mark.parametrize(
    ("line", "number", "code"),
    [
        pytest.param(
            *("sample digits --steps 1000 --num-images 999 --out {}/d.png", signal.SIGINT, 130),
            marks=pytest.mark.slow,
        ),
        ("generate digits --steps 1000 --out {}/many", signal.SIGTERM, 143),
    ],
)
def test_a_stop_is_one_line_and_at_once(tmp_path, line, number, code):
    with child(line.format(tmp_path)) as process:
        began = process.stderr.read(20)  # of the bar
        process.send_signal(number)
        said = process.stderr.read()
        assert process.wait(timeout=60) == code
    assert "0%" in began + said
    again = "; the same command goes on from here" if "generate" in line else ""
    assert said.endswith(f"\nddim-jax: stopped{again}\n")
    assert "Traceback" not in said


def test_which_errors_of_jax_are_said_in_a_line():
    full = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory\nHLO: 3 pages")
    assert (
        cli._said(full) == "RESOURCE_EXHAUSTED: out of memory; try a smaller batch, or more devices"
    )
    assert cli._said(RuntimeError("of our own making")) is None  # it keeps its traceback


@pytest.mark.parametrize("platform", ["rocm", pytest.param("abacus", marks=pytest.mark.slow)])
def test_a_platform_that_is_not_there(tmp_path, platform):
    with child(f"sample digits --out {tmp_path}/d.png", JAX_PLATFORMS=platform) as process:
        said = process.stderr.read()
    assert process.returncode == 1
    assert said.startswith(f"ddim-jax: error: JAX_PLATFORMS={platform} asks for a platform")
    assert "there is cpu. Unset JAX_PLATFORMS" in said
    assert len(said.splitlines()) == 2  # with how to see more
