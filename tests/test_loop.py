"""The loop: exact resumption, signals, locks, damage, divergence; on one device and on eight."""

import dataclasses
import json
import os
import signal
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import ddim_jax as ddim
from ddim_jax.data import Dataset
from ddim_jax.networks.unet import UNetConfig, build, make_apply
from ddim_jax.process.schedule_config import ScheduleConfig
from ddim_jax.storage.checkpoint import restore_config, restore_part
from ddim_jax.storage.checkpoint_folder import CheckpointError, DamagedError, saved_steps
from ddim_jax.training import collecting, loop
from ddim_jax.training import step as training
from ddim_jax.training.config import TrainConfig
from ddim_jax.training.loop import fit
from ddim_jax.training.resuming import check_run, check_same_run
from ddim_jax.training.run_folder import Preempted, locked, writer
from ddim_jax.training.summary import summarise
from ddim_jax.weights import load_model, to_facts
from tests.tiny import (
    SCHEDULE,
    affine,
    affine_params,
    assert_same,
    make_config,
    make_dataset,
)

pytestmark = pytest.mark.usefixtures("one_trace")


def train(directory, config=None, **options):
    options = {"progress": False, "facts": {"model": {"kind": "affine"}}, **options}
    dataset = options.pop("dataset", make_dataset())
    apply_fn = options.pop("apply_fn", affine)
    return fit(
        apply_fn, affine_params(), SCHEDULE, dataset, config or make_config(), directory, **options
    )


def logged(directory):
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"], line["grad_norm"]) for line in lines]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """The final state and the log of a run of `make_config()`."""
    directory = tmp_path_factory.mktemp("unbroken")
    return train(directory), logged(directory)


def test_a_run_keeps_the_names_of_its_classes(tmp_path):
    """If it learns classes; and a run that was begun without the names, or norm_groups, goes on."""
    dataset = dataclasses.replace(make_dataset(), label_names=tuple("abcdefghij"))
    facts = {"model": {"channels": 32, "norm_groups": 32}}
    for num_classes, names in ((10, list("abcdefghij")), (None, None)):
        _, kept = check_run(dataset, make_config(), tmp_path, facts, num_classes)
        assert kept.get("label_names") == names
    before = {"train": kept["train"], "data": kept["data"], "prediction": "eps"}
    before |= {"model": {"channels": 32}}
    _, now = check_run(dataset, make_config(), tmp_path, facts, 10)
    assert check_same_run(before, now) == []
    now["model"]["norm_groups"] = 8
    with pytest.raises(ValueError, match="model.norm_groups: saved 32, now 8"):
        check_same_run(before, now)


def test_a_run_folder_holds_all_that_a_reader_needs(tmp_path, capsys):
    seen = []
    config = make_config(num_updates=11, keep=2)
    state = train(tmp_path, config, progress=True, on_log=lambda s, line: seen.append(line))
    assert saved_steps(tmp_path / "checkpoints") == [8, 11]
    assert_same(restore_part(tmp_path / "checkpoints", "ema"), state.ema)
    saved = restore_config(tmp_path / "checkpoints")
    assert TrainConfig(**saved["train"]) == config
    assert (saved["model"], saved["data"]) == ({"kind": "affine"}, {"name": "noise"})
    assert [line["step"] for line in seen] == [2, 4, 6, 8, 10, 11]
    assert seen == [
        json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()
    ]
    assert all(line["images_per_second"] > 0 for line in seen)
    assert len(list(tmp_path.glob("events.out.tfevents.*"))) == 1
    assert "11/11" in capsys.readouterr().err


def test_logged_values_are_means_over_the_interval(tmp_path, unbroken):
    train(tmp_path, make_config(log_every=1))
    each, two = np.array(logged(tmp_path)), np.array(unbroken[1])
    np.testing.assert_allclose(two[:, 1:], each[:, 1:].reshape(6, 2, 2).mean(1), rtol=1e-6)


@pytest.mark.parametrize("killed_at", [2, 6, pytest.param(10, marks=pytest.mark.slow)])
def test_a_resumed_run_is_the_unbroken_run(tmp_path, unbroken, killed_at):
    def kill(state, line):
        if line["step"] == killed_at:
            raise KeyboardInterrupt

    config = make_config(checkpoint_every=2)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "broken", config, on_log=kill)
    saved = saved_steps(tmp_path / "broken" / "checkpoints")
    assert saved[-1:] == ([killed_at - 2] if killed_at > 2 else [])  # 2: before the first
    resumed = train(tmp_path / "broken", resume="auto")
    assert_same(resumed, unbroken[0])
    assert logged(tmp_path / "broken") == unbroken[1]


def test_a_finished_run_can_be_made_longer(tmp_path, unbroken):
    train(tmp_path, make_config(num_updates=8))
    assert_same(train(tmp_path, resume="must"), unbroken[0])
    assert logged(tmp_path) == unbroken[1]


def test_a_run_that_died_before_its_first_checkpoint_starts_anew(tmp_path):
    unbroken = train(tmp_path / "whole", make_config(num_updates=8))
    (tmp_path / "dead" / "checkpoints").mkdir(parents=True)
    (tmp_path / "dead" / "metrics.jsonl").write_text('{"step": 2, "loss": 1.0}\n{"step": 4')
    assert_same(train(tmp_path / "dead", make_config(num_updates=8), resume="auto"), unbroken)
    lines = (tmp_path / "dead" / "metrics.jsonl").read_text().splitlines()
    steps = [json.loads(line)["step"] for line in lines]
    assert steps == [2, 4, 6, 8]


def test_another_number_of_classes_is_refused(tmp_path):
    with pytest.raises(ValueError, match="for 9 classes, noise has 10"):
        train(tmp_path, num_classes=9)


def test_a_decaying_rate_ties_the_run_to_its_length(tmp_path):
    train(tmp_path, make_config(num_updates=4, cosine_decay=True))
    with pytest.raises(ValueError, match=r"train\.num_updates: saved 4, now 8"):
        train(tmp_path, make_config(num_updates=8, cosine_decay=True), resume="must")


def test_a_torn_last_line_of_metrics_is_dropped_on_resume(tmp_path):
    train(tmp_path, make_config(num_updates=4))
    whole = logged(tmp_path)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')
    train(tmp_path, make_config(num_updates=8), resume="must")
    assert logged(tmp_path)[:2] == whole
    assert [step for step, _, _ in logged(tmp_path)] == [2, 4, 6, 8]


def test_a_folder_with_a_run_is_refused(tmp_path):
    train(tmp_path, make_config(num_updates=4))
    before = logged(tmp_path)
    with pytest.raises(FileExistsError, match="already holds a run; resume it, or choose another"):
        train(tmp_path)
    assert logged(tmp_path) == before
    with pytest.raises(CheckpointError, match="no checkpoint to resume from; resume 'auto' begins"):
        train(tmp_path / "nowhere", resume="must")
    assert not (tmp_path / "nowhere").exists()
    with pytest.raises(ValueError, match="'never', 'auto' or 'must', got True"):
        train(tmp_path, resume=True)


def test_resuming_another_run_shows_the_differences(tmp_path):
    train(tmp_path, make_config(num_updates=4))
    with pytest.raises(ValueError, match="must keep its configuration") as error:
        train(
            tmp_path,
            make_config(learning_rate=0.5),
            facts={"model": {"kind": "mlp"}},
            resume="must",
        )
    assert "train.learning_rate: saved 0.01, now 0.5" in str(error.value)
    assert "model.kind: saved 'affine', now 'mlp'" in str(error.value)
    assert "num_updates" not in str(error.value)
    other = dataclasses.replace(make_dataset(), provenance={"name": "other"})
    with pytest.raises(ValueError, match="data.name: saved 'noise', now 'other'"):
        train(tmp_path, dataset=other, resume="must")


@pytest.mark.slow
def test_what_is_predicted_travels_with_the_run_and_stays(tmp_path, one_device):
    facts = to_facts(TEN, OBLONG)
    learns_v = make_config(num_updates=1, prediction="v")
    oblong(tmp_path, facts=facts)
    model = load_model(tmp_path)
    assert model.prediction.kind == "v"
    x_T = ddim.initial_noise(jax.random.key(0), 2, model.image_shape)
    bare = ddim.Model(ddim.predicts(make_apply(OBLONG), "v"), model.params, model.schedule)
    x_0, again = (ddim.make_sampler(m, ddim.timesteps(10, 3))(x_T) for m in (model, bare))
    assert_same(x_0, again)
    other = make_config(num_updates=1, prediction="x_0")
    with pytest.raises(ValueError, match="train.prediction: saved 'v', now 'x_0'"):
        oblong(tmp_path, facts=facts, train=other, resume="must")
    with pytest.raises(ValueError, match="facts say .*'eps'.*, config that .*'v'"):
        oblong(tmp_path / "new", facts={**facts, "prediction": "eps"}, train=learns_v)
    with pytest.raises(ValueError, match="predict"):
        train(tmp_path / "new", learns_v, apply_fn=ddim.predicts(affine, "x_0"))
    assert not (tmp_path / "new").exists()


def test_the_objective_travels_with_the_run_and_stays(tmp_path):
    """F of data of deviation 0.3, weighed; and ε is not learned at zero terminal SNR."""
    learns = {"prediction": "edm", "gamma": "min-snr-5", "sigma_data": 0.3, "num_updates": 2}
    state = train(tmp_path, make_config(**learns))
    assert np.isfinite(state.ema["w"])
    facts = restore_config(tmp_path / "checkpoints")
    assert facts["train"]["gamma"] == "min-snr-5"
    assert (facts["prediction"], facts["sigma_data"]) == ("edm", 0.3)
    for name, value in (("gamma", "one"), ("sigma_data", 0.4)):
        with pytest.raises(ValueError, match=f"train.{name}: saved {learns[name]!r}, now"):
            train(tmp_path, make_config(**learns | {name: value}), resume="must")
    zero = dataclasses.replace(TEN, zero_terminal_snr=True)
    with pytest.raises(ValueError, match="zero terminal SNR"):
        oblong(tmp_path / "new", train=make_config(), schedule=zero)
    assert not (tmp_path / "new").exists()


def test_a_run_of_before_there_was_a_choice_of_gamma_goes_on():
    wanted = {"train": dataclasses.asdict(make_config())}
    old = wanted["train"].keys() - {"gamma", "sigma_data"}
    saved = {"train": {name: wanted["train"][name] for name in old}}
    assert check_same_run(saved, wanted) == []
    with pytest.raises(ValueError, match="train.gamma: saved 'one', now 'bound'"):
        check_same_run(saved, {"train": wanted["train"] | {"gamma": "bound"}})


def test_what_changes_rounding_alone_may_change_on_resuming_and_is_said(tmp_path):
    def train_model(name, model, config, **options):
        facts = {"model": {"kind": "affine", **model}}
        return train(tmp_path / name, config, facts=facts, apply_fn=undropped, **options)

    def undropped(params, x, t, dropout_key=None):
        return affine(params, x, t)

    short, long = (make_config(batch_size=16, num_updates=n) for n in (4, 8))
    unbroken = train_model("whole", {"remat": False}, long)
    train_model("cut", {"remat": False}, short)
    said = []
    changed = dataclasses.replace(long, accumulate=2, fsdp=2)
    resumed = train_model("cut", {"remat": True}, changed, resume="must", say=said.append)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), resumed, unbroken)
    assert "up to rounding" in said[-1]
    assert said[-1].splitlines()[1:] == [
        "  model.remat: saved False, now True",
        "  train.accumulate: saved 1, now 2",
        "  train.fsdp: saved 1, now 2",
    ]
    with pytest.raises(ValueError, match="model.dtype: saved nothing, now 'bfloat16'"):
        train_model("cut", {"remat": True, "dtype": "bfloat16"}, changed, resume="must")


OBLONG = UNetConfig((4, 8), 1, 32, (1,), num_blocks=1, attention_resolutions=())
TEN = ScheduleConfig("cosine", 10)


def oblong(
    directory, config=OBLONG, facts=None, shape=(4, 8, 1), schedule=TEN, train=None, **options
):
    images = np.zeros((8, *shape), np.uint8)
    labels = np.zeros(8, np.int32)
    dataset = Dataset(
        "bars", "train", 8, shape, None, {"name": "bars"}, lambda i: (images[i], labels[i])
    )
    return fit(
        *build(config, jax.random.key(0)),
        schedule.build(),
        dataset,
        train or make_config(num_updates=1, prediction="v"),
        directory,
        facts=facts,
        progress=False,
        **options,
    )


@pytest.mark.slow
def test_a_run_on_oblong_images_is_read_as_such(tmp_path, one_device):
    said = []
    state = oblong(tmp_path, facts=to_facts(TEN, OBLONG), say=said.append)
    model = load_model(tmp_path)
    assert model.image_shape == (4, 8, 1)
    assert model.config == OBLONG
    assert_same(model.params, state.ema)
    assert said == []


def test_what_load_model_would_miss_is_said_at_the_start(tmp_path, one_device):
    said = []
    state = train(tmp_path / "own", make_config(num_updates=1), facts=None, say=said.append)
    assert "will not read this run" in said[0]
    assert "facts=to_facts(schedule_config, unet_config)" in said[0]
    where = said[0].split("restore_part(")[1].rstrip(")").strip("'")
    assert_same(restore_part(where), state.ema)
    with pytest.raises(ValueError, match=r"images \(4, 4, 1\), bars has \(4, 8, 1\): set image_"):
        oblong(tmp_path / "a", facts=to_facts(TEN, dataclasses.replace(OBLONG, image_size=4)))
    with pytest.raises(ValueError, match="conv_in.*got"):
        oblong(tmp_path / "a", facts=to_facts(TEN, dataclasses.replace(OBLONG, channels=64)))
    other = dataclasses.replace(TEN, num_steps=20)
    with pytest.raises(ValueError, match="schedule of facts, .*num_steps=20.*is not the one"):
        oblong(tmp_path / "a", facts=to_facts(other, OBLONG))
    labelled = dataclasses.replace(OBLONG, num_classes=10)
    with pytest.raises(ValueError, match="for 10 classes, fit was called with num_classes=None"):
        oblong(tmp_path / "a", labelled, facts=to_facts(TEN, labelled))
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_divergence_names_the_step_and_leaves_good_checkpoints(tmp_path, monkeypatch, where):
    # The loss −w has the gradient −1, so that Adam without warm-up moves w by learning_rate a
    # step: step n starts from w = 0.01 (n − 1), and w > 0.065 first holds at step 8.
    def toy_loss(denoise, schedule, x_0, key, gamma, *, indices):
        w = denoise(x_0, None).mean()
        if where == "loss":
            return -w + jnp.where(w > 0.065, jnp.nan, 0.0)
        return jax.lax.cond(w > 0.065, lambda w: jnp.sqrt(0.0 * w), lambda w: -w, w)  # slope 0 · ∞

    monkeypatch.setattr(training, "loss", toy_loss)

    def apply_fn(params, x, t, dropout_key=None):
        return params["w"] + 0.0 * x

    config = make_config(num_updates=40, log_every=5, checkpoint_every=5, warmup_steps=0)
    name = "loss" if where == "loss" else "grad_norm"
    with pytest.raises(FloatingPointError, match=f"{name} is nan at step 8: training stopped"):
        fit(
            apply_fn,
            {"w": jnp.float32(0)},
            SCHEDULE,
            make_dataset(),
            config,
            tmp_path,
            progress=False,
        )
    assert saved_steps(tmp_path / "checkpoints") == [5]
    w = restore_part(tmp_path / "checkpoints", "params")["w"]
    np.testing.assert_allclose(w, 0.05, rtol=1e-4)


# Signals and locks.


def send_at(step, number):
    return lambda state, line: line["step"] == step and os.kill(os.getpid(), number)


@pytest.mark.parametrize(
    ("number", "at"),
    [
        (signal.SIGTERM, 8),
        pytest.param(signal.SIGTERM, 2, marks=pytest.mark.slow),
        (signal.SIGINT, 2),
        pytest.param(signal.SIGINT, 8, marks=pytest.mark.slow),
    ],
)
def test_a_signal_saves_and_the_resumed_run_is_the_unbroken_run(tmp_path, unbroken, number, at):
    before = signal.getsignal(number)
    with pytest.raises(Preempted, match=f"at step {at + 1}, saved .*--resume auto") as stopped:
        train(tmp_path, on_log=send_at(at, number))
    assert stopped.value.step == at + 1  # in the middle of an interval of metrics
    assert saved_steps(tmp_path / "checkpoints")[-1] == at + 1
    assert signal.getsignal(number) == before
    assert_same(train(tmp_path, resume="must"), unbroken[0])
    assert logged(tmp_path) == unbroken[1]


def test_a_second_signal_is_the_systems_own(tmp_path):
    seen = []

    def on_log(state, line):
        if line["step"] == 4:
            os.kill(os.getpid(), signal.SIGTERM)
            seen.append([signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)])

    with pytest.raises(Preempted):
        train(tmp_path, on_log=on_log)
    assert seen == [[signal.SIG_DFL, signal.SIG_DFL]]


def test_one_writer_at_a_time(tmp_path):
    with locked(tmp_path):
        assert writer(tmp_path).startswith(f"process {os.getpid()} on ")
        with pytest.raises(BlockingIOError, match=f"written by process {os.getpid()} on"):
            train(tmp_path)
        assert not (tmp_path / "checkpoints").exists()
    assert writer(tmp_path) is None
    train(tmp_path)


# Damage.


def garble(path):
    largest = max((p for p in path.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)


def test_a_damaged_checkpoint_is_passed_over_only_when_asked(tmp_path, unbroken):
    train(tmp_path / "hurt", make_config(num_updates=8))
    folder = tmp_path / "hurt" / "checkpoints"
    garble(folder / "8" / "state")
    with pytest.raises(DamagedError, match=r"8 .*damaged.*beside it: 4.*--fallback"):
        train(tmp_path / "hurt", resume="auto")
    assert saved_steps(folder) == [4, 8]
    said = []
    state = train(tmp_path / "hurt", resume="auto", fallback=True, say=said.append)
    assert_same(state, unbroken[0])
    assert logged(tmp_path / "hurt") == unbroken[1]
    assert "going on from step 4, the newest intact checkpoint" in said[-1]
    assert (tmp_path / "hurt" / "damaged" / "8" / "state").is_dir()
    garble(folder / "8" / "state")
    garble(folder / "12" / "state")
    garble(folder / "4" / "state")
    with pytest.raises(DamagedError, match="is intact: 12, 8, 4"):
        train(tmp_path / "hurt", resume="auto", fallback=True, say=said.append)
    assert saved_steps(folder) == [4, 8, 12]  # nothing was moved


def test_a_summary_survives_damage(tmp_path):
    train(tmp_path)
    garble(tmp_path / "checkpoints" / "8" / "state")
    (tmp_path / "checkpoints" / "12" / "_CHECKPOINT_METADATA").unlink()
    said = summarise(tmp_path)
    assert "UNREADABLE" in said["checkpoints"]["12"]
    assert said["configuration"]["model"] == {"kind": "affine"}
    assert said["step"] == "12 of 12"
    said = summarise(tmp_path, verify=True)
    assert "every digest matches" in said["checkpoints"]["4"]
    assert "UNREADABLE" in said["checkpoints"]["8"]
    with pytest.raises(ValueError, match="is not a run"):
        summarise(tmp_path / "checkpoints" / "4" / "state")


def test_a_fallback_of_another_run_moves_nothing(tmp_path):
    train(tmp_path, make_config(num_updates=8))
    garble(tmp_path / "checkpoints" / "8" / "state")
    with pytest.raises(ValueError, match=r"train\.learning_rate: saved 0\.01, now 0\.5"):
        train(tmp_path, make_config(learning_rate=0.5), resume="auto", fallback=True)
    assert saved_steps(tmp_path / "checkpoints") == [4, 8]


def test_a_failed_start_does_not_bar_the_next(tmp_path):
    def broken(indices):
        raise ValueError("record 7 is corrupt")

    with pytest.raises(ValueError, match="record 7 is corrupt"):
        train(tmp_path, dataset=dataclasses.replace(make_dataset(), read=broken))
    train(tmp_path)


def test_a_run_longer_than_asked_for_is_an_error(tmp_path):
    train(tmp_path, make_config(num_updates=8))
    with pytest.raises(ValueError, match="is at step 8, past num_updates = 4"):
        train(tmp_path, make_config(num_updates=4), resume="must")


def test_metrics_that_cannot_be_written_are_named(tmp_path, monkeypatch, one_device):
    from tensorboardX.event_file_writer import EventFileWriter
    from tensorboardX.record_writer import RecordWriter

    written, begun, begin = [], [], EventFileWriter.__init__

    def write(self, data):
        written.append(data)
        if len(written) > 8:
            raise OSError("No space left on device")

    def remembered(self, *args, **kwargs):
        begun.append(self)
        begin(self, *args, **kwargs)

    monkeypatch.setattr(EventFileWriter, "__init__", remembered)
    monkeypatch.setattr(RecordWriter, "write", write)
    monkeypatch.setattr("threading.excepthook", lambda _: None)
    with pytest.raises(OSError, match="could not write metrics or pictures in .*is the disk full"):
        train(tmp_path, make_config(num_updates=4000, log_every=1, checkpoint_every=4000))
    (board,) = begun
    assert board._closed  # or the process would not end


def test_a_log_that_is_not_one_is_named(tmp_path):
    train(tmp_path, make_config(num_updates=4))
    log = tmp_path / "metrics.jsonl"
    whole = log.read_text()
    for line in ("no metrics", '{"step": 1}', '{"step": null, "loss": 1.0}', "[1]"):
        log.write_text(line + "\n" + whole)
        with pytest.raises(ValueError, match=r"metrics\.jsonl, line 1 is not a line of metrics"):
            train(tmp_path, resume="auto")
        assert log.read_text() == line + "\n" + whole


# Divergence by choice, pictures, counting.


def sometimes_nan(params, x, t, dropout_key=None):
    """NaN where an image's first pixel is the darkest of all: some batches, not others."""
    bad = (x[:, 0, 0, 0] < -0.9).any() & (t.max() > 8)
    return params["w"] * x + params["b"] + jnp.where(bad, jnp.nan, 0.0)


def test_updates_that_are_not_finite_are_skipped_by_choice_and_counted(tmp_path, one_device):
    config = make_config(skip_nonfinite=True, log_every=1, num_updates=16)
    arguments = (affine_params(), SCHEDULE, make_dataset())
    seen = []

    def on_log(state, line):
        seen.append((line["step"], line["skipped"]))
        assert int(state.step) == line["step"]
        assert np.isfinite(float(state.params["w"]))

    fit(sometimes_nan, *arguments, config, tmp_path / "a", progress=False, on_log=on_log)
    gaps = np.diff([0, *[step for step, _ in seen]])  # a line waits for a finite loss
    assert (gaps - 1 == [count for _, count in seen]).all()
    assert 0 < gaps.sum() - len(seen) < 16
    first_bad = next(step for step in range(1, 17) if step not in dict(seen))
    with pytest.raises(FloatingPointError, match=f"at step {first_bad}.*was images .* of noise"):
        fit(sometimes_nan, *arguments, dataclasses.replace(config, skip_nonfinite=False),
            tmp_path / "b", progress=False)  # fmt: skip


def test_a_run_that_would_skip_everything_stops(tmp_path, one_device):
    def always_nan(params, x, t, dropout_key=None):
        return params["w"] * x * jnp.nan

    config = make_config(skip_nonfinite=True, num_updates=200, checkpoint_every=200)
    arguments = (always_nan, {"w": jnp.float32(1)}, SCHEDULE, make_dataset(2000), config)
    with pytest.raises(FloatingPointError, match="the 100 updates up to step 100 were all skipped"):
        fit(*arguments, tmp_path, progress=False)


def test_skipped_updates_in_a_row_are_counted_across_lines(tmp_path, monkeypatch, one_device):
    monkeypatch.setattr(collecting, "MAX_SKIPPED", 5)

    def late_nan(params, x, t, dropout_key=None):
        return params["w"] * x + jnp.where(params["n"] > 3, jnp.nan, 0.0)

    def count(step):  # n counts the steps that are not skipped: the fifth and all later are bad
        def counting(state, batch, *more):
            state = state._replace(params={**state.params, "n": 1.0 + state.params["n"]})
            return step(state, batch, *more)

        return jax.jit(counting)

    make = loop.make_train_step
    monkeypatch.setattr(loop, "make_train_step", lambda *a: count(make(*a)))
    config = make_config(skip_nonfinite=True, num_updates=40, log_every=20, checkpoint_every=7)
    params = {"w": jnp.float32(1), "n": jnp.float32(0)}
    with pytest.raises(FloatingPointError, match="5 updates up to step (8|9) were all skipped"):
        fit(late_nan, params, SCHEDULE, make_dataset(), config, tmp_path, progress=False)


def test_pictures_are_drawn_from_the_average_at_fixed_latents(tmp_path):
    train(tmp_path, make_config(sample_every=4, learning_rate=1e-30))
    pictures = sorted((tmp_path / "samples").iterdir())
    assert [p.name for p in pictures] == ["00000004.png", "00000008.png", "00000012.png"]
    pixels = [np.asarray(Image.open(p)) for p in pictures]
    assert pixels[0].shape[2] == 3
    np.testing.assert_array_equal(pixels[0], pixels[2])  # nothing was learned: the same digits
    assert len(np.unique(pixels[0])) > 50
    board = next(tmp_path.glob("events.out.tfevents.*")).read_bytes()
    assert board.count(b"samples") == 3
    assert b"param_norm" in board


def test_a_line_is_timed_by_when_its_steps_were_done():
    """Not by when the host came to ask, which may be a whole call later."""
    collected = collecting.Collected(make_config(), make_dataset(), {"loss": []}, 0)
    collected.add({"loss": jnp.ones(1), "param_norm": jnp.ones(1)})
    collected._clock.shutdown()  # waits until it has seen the time
    asked = time.perf_counter()
    collected.fetch(1)
    assert 0 < collected.ended <= asked


def test_arithmetic_is_counted(tmp_path, monkeypatch):
    def products(params, x, t, dropout_key=None):
        return (params["w"] @ x[..., 0] @ params["w"])[..., None]

    monkeypatch.setattr(loop.parallel, "peak_flops", lambda kind: 1e9)
    seen = []
    fit(
        products,
        {"w": jnp.eye(4)},
        SCHEDULE,
        make_dataset(),
        make_config(num_updates=2),
        tmp_path,
        progress=False,
        on_log=lambda state, line: seen.append(line),
    )
    speed, each = seen[0]["images_per_second"], 2 * 2 * 4**3  # two products of 4 × 4
    np.testing.assert_allclose(seen[0]["flops_per_second"], 3 * each * speed)
    np.testing.assert_allclose(seen[0]["mfu"], 3 * each * speed / (8 * 1e9))
    seen.clear()
    train(tmp_path / "affine", make_config(num_updates=2), on_log=lambda s, line: seen.append(line))
    assert not {"mfu", "flops_per_second"} & seen[0].keys()  # it has no product of matrices


def test_a_batch_that_the_devices_cannot_share_is_refused(tmp_path):
    with pytest.raises(ValueError, match="batch_size = 12 .* split over 8 devices: make it a mul"):
        train(tmp_path, make_config(batch_size=12))
    with pytest.raises(ValueError, match="in accumulate = 2 parts .* a multiple of 16"):
        train(tmp_path, make_config(accumulate=2))
    with pytest.raises(ValueError, match="fsdp must divide the number of devices, 8, got 3"):
        train(tmp_path, make_config(fsdp=3))
    assert list(tmp_path.iterdir()) == []
