import json
import re
import sys

import jax
import numpy as np
import pytest
from PIL import Image

import ddim_jax as ddim
from ddim_jax import cli, unet
from ddim_jax.checkpoint import saved_steps
from ddim_jax.generate import iter_shards
from ddim_jax.images import grid, to_uint8
from ddim_jax.presets import PRESETS
from ddim_jax.pretrained import to_facts
from ddim_jax.state_dict import to_state_dict
from ddim_jax.unet import abstract_params, count_params
from ddim_jax.weights import write_safetensors
from tests import torch_writer


@pytest.fixture
def command(monkeypatch, tmp_path, capsys, one_device):
    """Runs `ddim-jax …` in an empty folder; returns what it printed, or raises SystemExit."""
    monkeypatch.chdir(tmp_path)
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
SHORT = f"{SMALL} --train.log-every 2 --train.checkpoint-every 2 --train.no-cosine-decay"


def test_train_resume_sample_info(command, tmp_path):
    said = command(f"train digits --out run {SHORT} --train.num-steps 2")
    assert "1,797 images" in said
    assert (tmp_path / "run" / "loss.png").stat().st_size > 1000
    with pytest.raises(SystemExit, match="already holds a run; resume it"):
        command(f"train digits --out run {SHORT} --train.num-steps 4")
    with pytest.raises(SystemExit, match=r"train.learning_rate: saved 0.002, now 0.5"):
        command(
            f"train digits --out run --resume must {SHORT} --train.num-steps 4 "
            "--train.learning-rate 0.5"
        )
    command(f"train digits --out run --resume auto {SHORT} --train.num-steps 4")
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [2, 4]
    said = command("info run --verify")
    assert said.count("every digest matches") == 2
    assert "preset: digits" in said
    assert "step: 4 of 4" in said
    assert re.search("loss: [0-9.]+ [▁-█]{2} [0-9.]+", said)
    assert len(list((tmp_path / "run" / "samples").iterdir())) == 2
    command("sample run --num-images 3 --steps 2 --out drawn.png")
    command("export run run.safetensors")
    with pytest.raises(SystemExit, match=r"run\.safetensors exists"):
        command("export run run.safetensors")
    command("sample run.safetensors --num-images 3 --steps 2 --out again.png")
    command("export run folder --diffusers --step 2")
    assert (tmp_path / "folder" / "unet" / "config.json").exists()
    command("sample folder --num-images 1 --steps 2 --out third.png")
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
        pixels = np.asarray(image)
    assert facts == {
        **{"model": "digits", "steps": 4, "eta": 0.5, "spacing": "linear"},
        **{"sigma_hat": False, "clip": False, "seed": 0},
    }
    with pytest.raises(SystemExit, match="exists; choose another --out, or pass --overwrite"):
        command("sample digits --num-images 5 --steps 4 --eta 0.5")
    command("sample digits --num-images 5 --steps 4 --eta 0.5 --batch-size 5 --overwrite")
    with Image.open(path) as image:  # another batch size, the same images
        assert np.abs(np.asarray(image).astype(int) - pixels).max() <= 1
    command("sample digits --num-images 1 --steps 3 --eta 1 --sigma-hat --clip --out hat.png")


def test_dry_run_of_every_preset(command, tmp_path):
    for name, make in PRESETS.items():
        said = command(f"train {name} --dry-run --train.seed 12")
        parameters = count_params(abstract_params(make().model))
        assert f"parameters: {parameters:,}" in said
        assert "seed: 12" in said
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
        ("sample digits --spacing cubic", "unknown spacing 'cubic'"),
        ("sample digits --sigma-hat", "--sigma-hat takes --eta 1"),
        ("sample digits --seed 4294967296", r"--seed must be in 0..2\*\*32 - 1"),
        ("export digits new --diffusers --float16", "--float16 is for a .safetensors file"),
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
        ("train digits --train.num-steps many", "many"),
        ("train digits --train.num-steps -4", "at least 1, got -4"),
        ("train digits --model.channels 33", "multiple of 32"),
        ("train digits --model.image-size 9", "multiple of 2"),
        ("nonsense", "nonsense"),
    ],
)
def test_usage_errors_name_what_is_wrong(command, line, says, capsys):
    with pytest.raises(SystemExit) as stop:
        command(line)
    assert stop.value.code == 2
    assert says in " ".join(capsys.readouterr().err.replace("│", " ").split())


def test_foreign_weights_are_refused(command, tmp_path):
    (tmp_path / "foreign.safetensors").write_bytes(b"not safetensors at all")
    with pytest.raises(SystemExit, match="not an intact safetensors file"):
        command("sample foreign.safetensors")
    (tmp_path / "e").mkdir()
    (tmp_path / "e" / "config.json").write_text('{"freq_shift": 0}')
    weights = tmp_path / "e" / "diffusion_pytorch_model.safetensors"
    write_safetensors(weights, {"w": np.zeros(1)}, {})
    with pytest.raises(SystemExit, match="error: e: freq_shift is 0"):
        command("sample e")
    (tmp_path / "empty" / "checkpoints").mkdir(parents=True)
    with pytest.raises(SystemExit, match="is empty, no checkpoint"):
        command("sample empty")


def test_weights_of_another_network_are_refused(tmp_path):
    model = ddim.load_model("digits")
    from ddim_jax.weights import save_weights

    facts = {**model.facts, "model": {**model.facts["model"], "channels": 32}}
    save_weights(tmp_path / "odd.safetensors", model.params, facts)
    with pytest.raises(ValueError, match="odd"):
        ddim.load_model(tmp_path / "odd.safetensors")
    save_weights(tmp_path / "bare.safetensors", model.params, {"model": {}})
    with pytest.raises(ValueError, match="no model and schedule"):
        ddim.load_model(tmp_path / "bare.safetensors")


def test_a_signal_ends_the_command_with_its_own_code(command, tmp_path, monkeypatch, capsys):
    from ddim_jax.run_folder import StopSignals

    monkeypatch.setattr(StopSignals, "requested", lambda self, step: step == 3)
    with pytest.raises(SystemExit) as stop:
        command(f"train digits --out run {SHORT} --train.num-steps 6")
    assert stop.value.code == 75
    assert "stopped by a signal at step 3, saved in run" in capsys.readouterr().err
    assert saved_steps(tmp_path / "run" / "checkpoints")[-1] == 3


def test_generate_many_images(command, tmp_path, monkeypatch):
    line = "generate digits --out many --num-images 12 --steps 2 --batch-size 2 --shard-size 4"
    assert "12 images" in command(line)
    names = {p.name for p in (tmp_path / "many").iterdir()}
    assert names == {"settings.json", *(f"images-0000{i}-of-00003.npy" for i in range(3))}
    command(line)  # finished: nothing to do
    with pytest.raises(SystemExit, match="eta: saved 0.0, now 0.5"):
        command(line + " --eta 0.5")
    said = command("evaluate many --data digits --blocks 0")
    assert re.match(r"FD-pixels [0-9.]+, KD-pixels .*, precision-pixels .*\(12 samples\)", said)
    reference = tmp_path / "digits-train-pixels.npz"
    assert reference.exists()
    with pytest.raises(SystemExit, match="pixels, resnet56:FILE or inception:FILE, got fid"):
        command("evaluate many --data digits --extractor fid")
    with pytest.raises(SystemExit, match=r"samples must be \(4, 4, 1\) each"):
        command("evaluate many --data digits --resize 4 --reference small.npz")
    monkeypatch.chdir(tmp_path / "many")
    assert command(f"evaluate . --data digits --blocks 0 --reference {reference}") == said


def test_without_the_training_extras(command, tmp_path, monkeypatch, capsys):
    for name in ("ddim_jax.cli_train", "ddim_jax.checkpoint"):
        monkeypatch.setitem(sys.modules, name, None)  # importing it is a ModuleNotFoundError
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    for line in ("train digits", "evaluate many --data digits", "sample run"):
        with pytest.raises(SystemExit, match=r"need: pip install 'ddim_jax\[train\]'"):
            command(line)
    with pytest.raises(SystemExit) as stop:
        command("--help")
    assert stop.value.code == 0
    assert "export" in capsys.readouterr().out


def test_data_commands(command):
    assert "digits" in command("data list").split()
    with pytest.raises(SystemExit, match="pip install tensorflow"):
        command("data prepare cifar10")
    with pytest.raises(SystemExit, match="say which data set to prepare"):
        command("data prepare")


def tiny(prediction):
    """A network of random weights."""
    config = unet.UNetConfig(8, 1, 32, (1,), num_blocks=1, attention_resolutions=(), dropout=0.0)
    apply_fn, params = unet.build(config, jax.random.key(0))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda p: p + rng.normal(0, 0.02, p.shape).astype(np.float32), params)
    schedule = ddim.ScheduleConfig("cosine")
    facts = to_facts(schedule, config, prediction)
    return ddim.Model(apply_fn, params, schedule.build(), config, facts, prediction)


def drawn_by(model, count):
    """What the commands are to draw, seed 0, S = 3, η = 0."""
    sampler = ddim.make_sampler(
        model.apply_fn, model.schedule, [333, 666, 1000], prediction=model.prediction
    )
    key = jax.random.split(jax.random.key(0))[0]
    return sampler(model.params, ddim.initial_noise(key, count, (8, 8, 1)))


def differ_by_rounding(a, b):
    return np.abs(np.asarray(a).astype(int) - np.asarray(b).astype(int)).max() <= 1


@pytest.mark.parametrize("prediction", [pytest.param("x_0", marks=pytest.mark.slow), "v"])
def test_every_command_knows_what_the_network_predicts(command, tmp_path, prediction):
    model = tiny(prediction)
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
    command("generate again.safetensors --out many --num-images 12 --steps 3")
    assert differ_by_rounding(next(iter_shards("many")), to_uint8(expected))
    settings = json.loads((tmp_path / "many" / "settings.json").read_text())
    assert settings["model"]["prediction"] == prediction
    assert "(12 samples)" in command("evaluate many --data digits --blocks 0")


def test_what_a_pytorch_file_does_not_say_is_given(command, tmp_path):
    model = tiny("v")
    (tmp_path / "m.ckpt").write_bytes(torch_writer.saved(to_state_dict(model.params)))
    with pytest.raises(SystemExit, match="neither the image size nor the noise schedule"):
        command("info m.ckpt")
    given = "m.ckpt --image-size 8 --schedule cosine --prediction v"
    assert "kind: cosine" in command(f"info {given}")
    command(f"sample {given} --num-images 12 --batch-size 12 --steps 3 --out drawn.png")
    with Image.open("drawn.png") as image:
        assert differ_by_rounding(image, grid(drawn_by(model, 12), scale=8))
    command(f"generate {given} --out many --num-images 2 --steps 3")
    command(f"export {given} m.safetensors")
    assert ddim.load_model("m.safetensors").prediction == "v"
