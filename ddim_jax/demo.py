"""The demo: train on the bundled digits, draw with few steps, and say how good it is."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import time
from collections.abc import Callable, Sequence

import jax
import numpy as np

from ddim_jax.arrays import image_keys
from ddim_jax.data import Dataset, load
from ddim_jax.evaluation import Moments, frechet_distance, moments
from ddim_jax.networks.unet import build, count_params
from ddim_jax.pictures import plots
from ddim_jax.pictures.images import to_model
from ddim_jax.process.spacing import timesteps
from ddim_jax.sampling import initial_noise, make_sampler, trajectory
from ddim_jax.storage.files import write_whole
from ddim_jax.training.loop import fit
from ddim_jax.training.presets import digits
from ddim_jax.training.run_folder import read_metrics
from ddim_jax.weights import Model, load_model, to_facts

STEPS = (10, 20, 50, 100)
ETAS = (0.0, 0.5, 1.0)
HEADLINE = (50, 0.0)  # the S and η that are scored on ten times as many samples
CHUNK = 100  # images in one call of the sampler


def run(
    out: pathlib.Path,
    num_updates: int | None = None,
    num_samples: int = 200,
    say: Callable[[str], None] = print,
) -> pathlib.Path:
    """Train the digits preset, sample it, and write pictures, figures and a page into one folder.

    A folder whose training was interrupted is taken up where its last checkpoint left it.

    Args:
      out: the folder, new, empty, or an interrupted demo's.
      num_updates: training steps, the preset's by default.
      num_samples: samples behind each Fréchet distance, ten times as many for S = 50, η = 0.
      say: told what is going on.

    Returns:
      The path of the page.

    Raises:
      FileExistsError: the folder holds a finished demo, or something else.
    """
    page = out / "index.html"
    if page.exists():
        raise FileExistsError(f"{out} holds a finished demo: open {page}, or choose another --out")
    run_folder = out / "run"
    if out.exists() and any(out.iterdir()) and not run_folder.exists():
        raise FileExistsError(f"{out} is not empty and holds no demo; choose another --out")
    began = time.perf_counter()
    preset = digits()
    train = dataclasses.replace(
        preset.train, num_updates=preset.train.num_updates if num_updates is None else num_updates
    )
    dataset = load(preset.data.name)
    apply_fn, params = build(preset.model, jax.random.key(train.seed))
    say(
        f"training {count_params(params):,} parameters for {train.num_updates} steps of "
        f"{train.batch_size} on {len(dataset)} digits ({jax.default_backend()})"
    )
    fit(
        apply_fn,
        params,
        preset.schedule.build(),
        dataset,
        train,
        run_folder,
        facts=to_facts(preset.schedule, preset.model),
        resume="auto",
    )
    trained = time.perf_counter() - began
    say(f"sampling {len(STEPS) * len(ETAS)} x {num_samples} digits")
    model = load_model(run_folder)
    cells, scores = draw_cells(model, dataset, num_samples)
    count, eta = HEADLINE
    best = draw_cells(model, dataset, 10 * num_samples, steps=[count], etas=[eta])[1][eta, count]
    floor, few = half_against_half(dataset), some_against_all(dataset, num_samples)
    strip = _trajectory(model)
    seconds = time.perf_counter() - began
    results = {
        "frechet_pixels": {f"eta={e:g},S={s}": v for (e, s), v in scores.items()},
        "frechet_pixels_real_half_against_real_half": floor,
        "frechet_pixels_as_many_real_against_all_real": few,
        "num_samples": num_samples,
        "headline": {"S": count, "eta": eta, "num_samples": 10 * num_samples, "frechet": best},
        "training_seconds": trained,
        "seconds": seconds,
        "train": dataclasses.asdict(train),
    }
    pictures = {
        "samples.png": (
            plots.png_bytes(plots.sample_table({k: v[:36] for k, v in cells.items()}, scores)),
            "Digits drawn by the network trained here. Every panel starts from the same x_T: at "
            "η = 0 the same latents give the same digits whatever the number of steps S.",
        ),
        "trajectory.png": (
            strip,
            "x_t and the prediction x̂_0 on the way from noise to digit, η = 0, S = 50.",
        ),
        "loss.png": (
            plots.png_bytes(plots.loss_curve(read_metrics(run_folder / "metrics.jsonl"))),
            "Training loss: the mean squared error of the predicted noise.",
        ),
    }
    for name, (png, _) in pictures.items():
        write_whole(out / name, png)
    write_whole(out / "results.json", (json.dumps(results, indent=2) + "\n").encode())
    write_whole(page, _page(scores, floor, few, results, pictures).encode())  # last: it is finished
    return page


def draw_cells(
    model: Model,
    dataset: Dataset,
    num_samples: int,
    seed: int = 0,
    steps: Sequence[int] | None = None,
    etas: Sequence[float] = ETAS,
) -> tuple[dict[tuple[float, int], np.ndarray], dict[tuple[float, int], float]]:
    """Samples and their pixel-space Fréchet distance to the data, for every (η, S).

    Args:
      model: the trained model.
      dataset: the data to compare with.
      num_samples: images a cell; the same x_T in every cell.
      seed: of x_T and of the noise.
      steps: the values of S, `STEPS` by default.
      etas: the values of η.

    Returns:
      ({(η, S): (n, H, W, C)}, {(η, S): distance}), pixels in [−1, 1].
    """
    reference = moments(np.asarray(to_model(dataset.arrays()["image"])))
    key, noise_key = jax.random.split(jax.random.key(seed))
    cells, scores = {}, {}
    for count in STEPS if steps is None else steps:
        tau = timesteps(model.schedule.num_steps, count)
        sampler = make_sampler(model, tau)
        for eta in etas:
            parts = []
            for start in range(0, num_samples, CHUNK):
                indices = np.arange(start, min(start + CHUNK, num_samples))
                x_T = initial_noise(key, indices, model.image_shape)
                parts.append(np.asarray(sampler(x_T, image_keys(noise_key, indices), eta=eta)))
            cells[eta, count] = np.concatenate(parts)
            scores[eta, count] = frechet_distance(moments(cells[eta, count]), reference)
    return cells, scores


def half_against_half(dataset: Dataset) -> float:
    """The distance between the even and the odd images of the data: the floor for any model."""
    images = np.asarray(to_model(dataset.arrays()["image"]))
    halves: list[Moments] = [moments(images[i::2]) for i in (0, 1)]
    return frechet_distance(*halves)


def some_against_all(dataset: Dataset, size: int) -> float:
    """The distance of `size` random images of the data to all of it: what few samples cost."""
    images = np.asarray(to_model(dataset.arrays()["image"]))
    some = np.random.default_rng(0).choice(len(images), min(size, len(images)), replace=False)
    return frechet_distance(moments(images[some]), moments(images))


def _trajectory(model: Model) -> bytes:
    tau = timesteps(model.schedule.num_steps, 50)
    x_T = initial_noise(jax.random.key(0), 4, model.image_shape)
    at = tau[np.linspace(0, 49, 12).round().astype(int)]
    path = trajectory(model.denoise, x_T, model.schedule, tau, at=at.tolist())
    return plots.png_bytes(
        plots.trajectory_strip(path.t, np.asarray(path.x_t), np.asarray(path.x_0))
    )


def _page(
    scores: dict[tuple[float, int], float],
    floor: float,
    few: float,
    results: dict,
    pictures: dict[str, tuple[bytes, str]],
) -> str:
    rows = [[f"η = {eta:g}", *(f"{scores[eta, s]:.3f}" for s in STEPS)] for eta in ETAS]
    train, headline = results["train"], results["headline"]
    return plots.page(
        "DDIM in JAX: digits in 10, 20, 50 and 100 steps",
        [
            f"<p>A U-Net learned scikit-learn's 8×8 digits for {train['num_updates']:,} steps of "
            f"{train['batch_size']} images on this machine, then drew {results['num_samples']:,} "
            f"digits for each number of steps S and each η. All of it took "
            f"{results['seconds']:.0f} seconds, training {results['training_seconds']:.0f}.</p>",
            plots.figure_html(*pictures["samples.png"]),
            "<h2>Fréchet distance in pixel space</h2>",
            plots.table_html(["", *(f"S = {s}" for s in STEPS)], rows),
            f"<p>With {headline['num_samples']:,} samples at S = {headline['S']}, η = "
            f"{headline['eta']:g}: <b>{headline['frechet']:.3f}</b>. One half of the real digits "
            f"against the other half: {floor:.3f}.</p>",
            '<p class="note">64 dimensions, pixels in [−1, 1], against all the data. Fewer samples '
            f"score higher: {results['num_samples']} real digits, as many as in each cell of the "
            f"table, score {few:.3f}. η = 0 is DDIM, η = 1 is DDPM.</p>",
            plots.figure_html(*pictures["trajectory.png"]),
            plots.figure_html(*pictures["loss.png"]),
        ],
    )
