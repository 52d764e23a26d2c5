"""Data: pixels, splits, epochs, exact continuation, worker processes, clear errors."""

import dataclasses
import json
import multiprocessing
import os
import pathlib
import runpy
import signal
import subprocess
import sys
import textwrap
import time

import numpy as np
import pytest
from sklearn.datasets import load_digits

from ddim_jax import data
from tests.tiny import shuffle_once


def indexed(size, name="indexed"):
    """A data set whose image i is a single pixel pair spelling i, with label i."""
    shuffle_once()

    def read(i):
        pixels = np.stack([i // 256, i % 256], -1).astype(np.uint8)
        return pixels.reshape(-1, 1, 2, 1), i.astype(np.int32)

    return data.Dataset(name, "train", size, (1, 2, 1), None, {"name": name}, read)


def draw(iterator, count):
    return np.concatenate([next(iterator)["label"] for _ in range(count)])


def test_digits_are_all_of_scikit_learns():
    digits, truth = data.load("digits"), load_digits()
    arrays = digits.arrays()
    assert arrays["image"].shape == (1797, 8, 8, 1)
    assert arrays["image"].dtype == np.uint8
    error = np.abs(arrays["image"][..., 0] - truth.images * (255 / 16))
    assert error.max() <= 0.5
    np.testing.assert_array_equal(arrays["label"], truth.target)
    assert (digits.num_classes, digits.image_shape, len(digits)) == (10, (8, 8, 1), 1797)
    assert digits.label_names == tuple("0123456789")
    for names in (("a", "b"), ("a",) * 10):
        with pytest.raises(ValueError, match="must be 10 different names, .* of digits, got"):
            dataclasses.replace(digits, label_names=names)
    np.testing.assert_array_equal(digits[1796]["image"], arrays["image"][1796])
    json.dumps(digits.provenance)


@pytest.mark.parametrize(
    ("split", "window"),
    [
        ("train", slice(None)),
        ("train[:50%]", slice(0, 898)),
        ("train[50%:]", slice(898, 1797)),
        ("train[10:20]", slice(10, 20)),
        ("train[-97:]", slice(1700, 1797)),
    ],
)
def test_digits_slices(split, window):
    labels = data.load("digits", split).arrays()["label"]
    np.testing.assert_array_equal(labels, load_digits().target[window])


WRONG = ["test", "train[", "train[1:2:3]", "train[5:5]", "train[2000:]", "train[:1798]"]


@pytest.mark.parametrize("split", [*WRONG, "train[-1798:]", "train[:101%]"])
def test_digits_wrong_split(split):
    with pytest.raises(ValueError, match="digits"):
        data.load("digits", split)


def test_transform_applies_to_each_image():
    digits = data.load("digits", "train[:9]", transform=lambda image: image[2:6, 1:7])
    assert digits.image_shape == digits[0]["image"].shape == (4, 6, 1)


@pytest.mark.parametrize(
    ("transform", "got"),
    [
        (lambda image: image / 255, r"float64 \(8, 8, 1\)"),
        (lambda image: image[..., 0], r"uint8 \(8, 8\)"),
        (lambda image: image[9:], r"uint8 \(0, 8, 1\)"),
    ],
)
def test_a_transform_makes_pixels(transform, got):
    with pytest.raises(ValueError, match=f"transform must return uint8 .*got {got} for an image"):
        data.load("digits", "train[:3]", transform=transform)


def test_every_epoch_is_a_permutation_and_no_two_are_the_same():
    size, batch = 60, 8  # 15 batches are 2 epochs: epochs join inside a batch
    labels = draw(data.batches(indexed(size), batch, seed=0), 30)
    epochs = labels.reshape(4, size)
    for epoch in epochs:
        np.testing.assert_array_equal(np.sort(epoch), np.arange(size))
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert (epochs != np.arange(size)).any(1).all()


def test_images_stay_with_their_labels():
    batch = next(data.batches(indexed(1000), 64, seed=3))
    pixels = batch["image"].astype(int)
    np.testing.assert_array_equal(pixels[:, 0, 0, 0] * 256 + pixels[:, 0, 1, 0], batch["label"])
    assert (batch["image"].dtype, batch["label"].dtype) == (np.uint8, np.int32)


def test_the_seed_decides_the_order_and_threads_do_not():
    def order(seed, **options):
        return tuple(draw(data.batches(indexed(100), 32, seed, **options), 7))

    assert order(0) == order(0, num_threads=0, prefetch=0) == order(0, num_threads=8, prefetch=16)
    assert len({order(seed) for seed in range(5)}) == 5


def test_a_batch_larger_than_the_data_set_spans_epochs():
    labels = next(data.batches(indexed(5), 13, seed=0))["label"]
    np.testing.assert_array_equal(np.sort(labels[:5]), np.arange(5))
    np.testing.assert_array_equal(np.sort(labels[5:10]), np.arange(5))
    assert len(labels) == 13


def test_the_order_is_the_one_that_old_runs_had():
    """Written down before batches could start anywhere: a run may be continued years later."""
    labels = draw(data.batches(indexed(1797), 32, seed=0), 401)
    assert labels[:8].tolist() == [1203, 1318, 1398, 141, 935, 215, 144, 766]
    assert labels[-32:][:8].tolist() == [166, 943, 69, 959, 1641, 540, 1770, 1760]
    labels = draw(data.batches(indexed(5), 13, seed=2, start=400), 1)
    assert labels[:8].tolist() == [4, 3, 2, 0, 1, 3, 4, 1]


@pytest.mark.parametrize("start", [1, 9, 40])
@pytest.mark.parametrize("shares", [1, 4])
def test_a_start_is_a_position(start, shares):
    share = {"process_index": shares - 1, "process_count": shares}
    whole = data.batches(indexed(70), 16, seed=1, **share)
    draw(whole, start)
    late = data.batches(indexed(70), 16, seed=1, start=start, num_threads=1, prefetch=1, **share)
    np.testing.assert_array_equal(draw(late, 12), draw(whole, 12))


def test_a_start_reads_nothing_before_it():
    taken = []
    dataset = indexed(70)
    spied = dataclasses.replace(dataset, read=lambda i: taken.append(i) or dataset.read(i))
    labels = draw(data.batches(spied, 16, 0, start=10**12, num_threads=0, prefetch=0), 1)
    np.testing.assert_array_equal(np.concatenate(taken), labels)


def test_batch_indices_name_the_images_of_a_batch():
    dataset = indexed(70)
    batches = data.batches(dataset, 16, seed=3)
    for number in range(12):
        indices = data.batch_indices(dataset, 16, 3, number)
        np.testing.assert_array_equal(next(batches)["label"], indices)
        half = data.batches(dataset, 16, 3, start=number, process_index=1, process_count=2)
        np.testing.assert_array_equal(draw(half, 1), indices[8:])


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_share_out_the_global_batch(processes):
    whole = data.batches(indexed(50), 16, seed=2)
    parts = [
        data.batches(indexed(50), 16, seed=2, process_index=p, process_count=processes)
        for p in range(processes)
    ]
    for _ in range(8):
        together = np.concatenate([next(part)["label"] for part in parts])
        np.testing.assert_array_equal(together, next(whole)["label"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size must be a positive multiple"),
        ({"batch_size": 7, "process_count": 2}, "positive multiple of process_count = 2, got 7"),
        ({"process_count": 2, "process_index": 2}, "process_index must be in 0..1, got 2"),
        ({"seed": -1}, "seed must be in"),
        ({"seed": 2**32}, "seed must be in"),
        ({"start": -1}, "start must be >= 0, got -1"),
        ({"num_workers": -1}, "num_workers must be >= 0, got -1"),
        ({"num_threads": -1}, "num_threads"),
    ],
)
def test_batches_rejects(options, message):
    with pytest.raises(ValueError, match=message):
        data.batches(indexed(5), **{"batch_size": 4, "seed": 0, **options})


def test_batch_indices_rejects():
    with pytest.raises(ValueError, match="number must be >= 0, got -1"):
        data.batch_indices(indexed(5), 4, 0, -1)
    with pytest.raises(ValueError, match="batch_size must be"):
        data.batch_indices(indexed(5), 0, 0, 0)
    with pytest.raises(ValueError, match="indexed train holds no images"):
        data.batches(indexed(0), 4, 0)


def alive(pids):
    """The processes that still run (a zombie does not)."""
    stats = [pathlib.Path(f"/proc/{pid}/stat") for pid in pids]
    return [s for s in stats if s.exists() and s.read_text().rsplit(")")[-1].split()[0] != "Z"]


def assert_soon(condition, seconds=20):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "still waiting"
        time.sleep(0.05)


@pytest.mark.parametrize("name", ["digits", "cifar10"])
def test_workers_give_the_same_batches_and_end_with_the_iterator(name):
    if name not in data.available():
        pytest.skip(f"{name} is not prepared; set {data.DATA_DIR_VARIABLE} to a TFDS directory")
    before = set(multiprocessing.active_children())
    dataset = data.load(name, "train[:1700]", transform=top_left)
    options = {"batch_size": 48, "seed": 4, "start": 3}
    batches = data.batches(dataset, **options, num_workers=2, num_threads=1, prefetch=2)
    for expected, batch in zip(data.batches(dataset, **options), [next(batches) for _ in range(9)]):
        np.testing.assert_array_equal(batch["image"], expected["image"])
        np.testing.assert_array_equal(batch["label"], expected["label"])
        assert {type(array) for array in batch.values()} == {np.ndarray}
    workers = [p.pid for p in set(multiprocessing.active_children()) - before]
    assert len(workers) == 2
    del batches
    assert_soon(lambda: not alive(workers))


def top_left(image):
    return image[:5, :6]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks into /proc")
def test_workers_leave_signals_to_the_run_and_do_not_survive_it(tmp_path):
    """A run that is told to stop still gets its batches; one that is killed takes them along."""
    script = """
        import multiprocessing, os, signal
        from ddim_jax import data

        if __name__ == "__main__":
            told = []
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, lambda number, frame: told.append(number))
            batches = data.batches(data.load("digits"), 32, 0, num_workers=1, prefetch=1)
            next(batches)
            os.killpg(0, signal.SIGTERM)
            os.killpg(0, signal.SIGINT)
            for _ in range(20):
                next(batches)
            print(len(told), *(p.pid for p in multiprocessing.active_children()), flush=True)
            signal.pause()
    """
    path = tmp_path / "run.py"
    path.write_text(textwrap.dedent(script))
    run = subprocess.Popen(
        [sys.executable, path],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    with run:
        try:
            told, *workers = map(int, run.stdout.readline().split())
            assert told == 2
            assert len(alive(workers)) == 1
        finally:
            run.kill()
    assert_soon(lambda: not alive(workers))


FORMS = {  # of a main script: source, whether worker processes may be started in it
    "plain": ("start()", False),
    "in a function": ("def work():\n    start()\n\nwork()", False),
    "in a loop": ("for _ in range(1):\n    start()", False),
    "guarded": ('if __name__ == "__main__":\n    start()', True),
    "guarded function": (
        'def work():\n    start()\n\nif "__main__" == __name__ and True:\n    work()',
        True,
    ),
}


@pytest.mark.parametrize(("source", "fine"), FORMS.values(), ids=FORMS)
def test_worker_processes_want_a_main_guard(tmp_path, source, fine):
    path = tmp_path / "script.py"
    path.write_text(source)
    dataset = indexed(5)
    scope = {"start": lambda: data.batches(dataset, 4, 0, num_workers=1)}
    if fine:
        runpy.run_path(str(path), scope, "__main__")
    else:
        with pytest.raises(
            RuntimeError, match=r'script.py, line \d: .* `if __name__ == "__main__"'
        ):
            runpy.run_path(str(path), scope, "__main__")


@pytest.mark.slow
def test_a_plain_script_with_worker_processes_ends_at_once(tmp_path):
    path = tmp_path / "plain.py"
    call = "next(data.batches(data.load('digits'), 8, 0, num_workers=1))"
    path.write_text(f"from ddim_jax import data\n{call}\n")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    run = subprocess.run(
        [sys.executable, path], capture_output=True, text=True, timeout=120, env=environment
    )
    assert run.returncode == 1
    assert "plain.py, line 2: worker processes import the main script" in run.stderr
    assert run.stderr.count("Traceback") == 1


def test_a_worker_that_would_start_workers_says_so_and_ends(monkeypatch):
    monkeypatch.setattr(multiprocessing.current_process(), "_inheriting", True, raising=False)
    with pytest.raises(SystemExit, match="a worker process ends: .*__main__"):
        data.batches(indexed(5), 4, 0, num_workers=1)
    next(data.batches(indexed(5), 4, 0))


@pytest.mark.slow  # grain may wait for ever on a worker killed at a bad moment: seen once
def test_a_killed_worker_is_an_error(request):
    def late(*_):
        raise TimeoutError("grain waits for a worker that is dead")

    request.addfinalizer(lambda: signal.alarm(0))
    signal.signal(signal.SIGALRM, late)
    signal.alarm(120)
    before = set(multiprocessing.active_children())
    batches = data.batches(indexed(50), 4, 0, num_workers=1, prefetch=1)
    next(batches)
    (worker,) = set(multiprocessing.active_children()) - before
    worker.kill()
    with pytest.raises(RuntimeError, match="a worker process has ended: it was killed"):
        draw(batches, 20)


def test_an_index_outside_the_data_set_is_an_error():
    with pytest.raises(IndexError, match=r"images 0..1796, got \[1797\]"):
        data.load("digits")[1797]
    with pytest.raises(IndexError):
        data.load("digits")[-1]


@pytest.mark.parametrize("name", ["", "mnist:", ":3.0.1", "mnist:3", "a/b/c", "../mnist", "a b"])
def test_what_cannot_be_a_name_is_not_looked_for(name):
    with pytest.raises(ValueError, match="a data set is 'digits', a path") as error:
        data.prepare(name)
    assert str(error.value).endswith(f"got {name!r}")
    path = "/" in name
    with pytest.raises(
        FileNotFoundError if path else ValueError,
        match=f"no file or folder .*{name}" if path else "a data set is 'digits', a path",
    ):
        data.load(name)


def test_on_corrupt_is_one_of_two():
    with pytest.raises(ValueError, match="on_corrupt must be 'stop' or 'skip', got 'ignore'"):
        data.load("digits", on_corrupt="ignore")


@pytest.mark.parametrize(
    ("name", "shape", "size", "mean", "std"),  # published constants of the training sets
    [
        ("mnist", (28, 28, 1), 60_000, [0.1307], [0.3081]),
        ("cifar10", (32, 32, 3), 50_000, [0.4914, 0.4822, 0.4465], [0.2470, 0.2435, 0.2616]),
    ],
)
def test_real_data(name, shape, size, mean, std):
    if name not in data.available():
        pytest.skip(f"{name} is not prepared; set {data.DATA_DIR_VARIABLE} to a TFDS directory")
    dataset = data.load(name)
    assert (dataset.image_shape, len(dataset), dataset.num_classes) == (shape, size, 10)
    chosen = np.random.default_rng(0).choice(size, 1000, replace=False)
    images = dataset.take(chosen)["image"] / 255
    for moment, published in ((images, mean), (images**2, np.square(mean) + np.square(std))):
        per_image = moment.mean((1, 2))
        standard_error = per_image.std(0) / len(chosen) ** 0.5
        assert (np.abs(per_image.mean(0) - published) < 4 * standard_error).all()


@pytest.mark.parametrize(("holdout", "number"), [(0.25, 15), (7, 7), (1, 1), (59, 59)])
def test_what_is_held_out_is_kept_apart(holdout, number):
    whole = indexed(60)
    kept = data.hold_out(whole, holdout)
    parts = [part.arrays()["label"] for part in (kept, kept.held_out)]
    assert (len(kept), len(kept.held_out)) == (60 - number, number)
    np.testing.assert_array_equal(np.sort(np.concatenate(parts)), np.arange(60))
    assert all((np.diff(part) > 0).all() for part in parts)
    seen = draw(data.batches(kept, 16, seed=1), 20)  # several epochs
    assert not set(seen) & set(parts[1])
    assert kept.held_out.held_out is None
    facts = [whole.provenance, kept.provenance, kept.held_out.provenance]
    assert len({json.dumps(fact) for fact in facts}) == 3


def test_what_is_held_out_stays_so_in_other_versions_and_grows():
    """Written down: the images that an old run has not seen must be those that are held out now."""
    images = indexed(1000)
    held = {n: set(data.hold_out(images, n).held_out.arrays()["label"]) for n in (5, 50, 500)}
    assert held[5] < held[50] < held[500]
    assert sorted(held[5]) == [196, 472, 558, 963, 992]
    spread = np.histogram(list(held[500]), 10, (0, 1000))[0]
    assert (abs(spread - 50) < 4 * (1000 * 0.05 * 0.5) ** 0.5).all()  # 4 standard errors of each


@pytest.mark.parametrize("holdout", [-1, 1.5, float("nan"), float("inf"), 60, 61, 0.001, 0.999])
def test_a_part_that_cannot_be_held_out(holdout):
    with pytest.raises(ValueError, match="holdout"):
        data.hold_out(indexed(60), holdout)


def test_nothing_is_held_out_twice_or_where_images_are_replaced():
    whole = indexed(60)
    assert data.hold_out(whole, 0) is whole
    with pytest.raises(ValueError, match="has a part held out already"):
        data.hold_out(data.hold_out(whole, 3).held_out, 1)
    skipping = dataclasses.replace(whole, provenance={"on_corrupt": "skip"})
    with pytest.raises(ValueError, match="holdout is to keep apart"):
        data.hold_out(skipping, 3)
