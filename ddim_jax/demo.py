"""The demo: train on the bundled digits, draw in few steps, say how good it is; then in colour."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import time
from collections.abc import Callable, Sequence

import jax
import numpy as np
from tqdm import tqdm

from ddim_jax.arrays import image_keys
from ddim_jax.data import Dataset, load
from ddim_jax.evaluation import frechet_distance, moments
from ddim_jax.generation.condition import class_numbers
from ddim_jax.generation.exploring import explore, num_calls, page_of, walker
from ddim_jax.networks.unet import build, count_params
from ddim_jax.pictures import plots
from ddim_jax.pictures.explorer import Exploration
from ddim_jax.pictures.images import grid, to_model
from ddim_jax.process.spacing import timesteps
from ddim_jax.sampling import ddim, initial_noise
from ddim_jax.storage.files import write_whole
from ddim_jax.training.loop import fit
from ddim_jax.training.presets import digits
from ddim_jax.training.run_folder import read_metrics
from ddim_jax.weights import Model, load_model, to_facts

STEPS = (10, 20, 50)
ETAS = (0.0, 1.0)
CHUNK = 100  # images in one call of the sampler
SHOWN = 36  # images in a panel
COLOUR = "cifar10-small"  # which ships, draws
CLASSES = ("horse", "ship", "automobile", "bird")  # in
COLOUR_SEED = 3  # whose pictures are clear: the third of six that were looked at
COLOUR_STEPS = (5, 10, 20)  # steps, at
PLACES = 3  # places on the path between two x_T of each
KINDS = {0.0: "DDIM, η = 0", 1.0: "DDPM, η = 1"}
Cells = dict[tuple[float, int], np.ndarray]  # (η, S) → (n, H, W, C), pixels in [−1, 1]


def run(
    out: pathlib.Path,
    num_updates: int | None = None,
    num_images: int = 300,
    say: Callable[[str], None] = print,
) -> pathlib.Path:
    """Train on the digits, sample, and write pictures, figures and a page into one folder.

    A folder whose training was interrupted is taken up where its last checkpoint left it.

    Args:
      out: the folder, new, empty, or an interrupted demo's.
      num_updates: training steps; by default half of the digits preset's, which make its pictures.
      num_images: samples behind each Fréchet distance.
      say: told what is going on.

    Returns:
      The path of the page.

    Raises:
      FileExistsError: the folder holds a finished demo, or something else.
      ValueError: num_images is too small for a distance.
    """
    page = out / "index.html"
    if page.exists():
        raise FileExistsError(f"{out} holds a finished demo: open {page}, or choose another --out")
    run_folder = out / "run"
    if out.exists() and any(out.iterdir()) and not run_folder.exists():
        raise FileExistsError(f"{out} is not empty and holds no demo; choose another --out")
    if num_images < 2:
        raise ValueError(f"num_images must be at least 2, got {num_images}")
    began = time.perf_counter()
    preset = digits()
    train = dataclasses.replace(
        preset.train,
        num_updates=preset.train.num_updates // 2 if num_updates is None else num_updates,
        sample_every=0,
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
        facts=to_facts(preset.schedule, preset.model, train.prediction),
        resume="auto",
    )
    trained = time.perf_counter() - began
    say(f"sampling {len(STEPS) * len(ETAS)} × {num_images} digits")
    model = load_model(run_folder)
    cells = draw_cells(model, num_images)
    say(f"drawing in colour with {COLOUR}, which ships: {', '.join(CLASSES)}")
    colour, explored = _explored()
    scores = {cell: score(images, dataset) for cell, images in cells.items()}
    floor = floor_of(dataset, num_images)
    results = {
        "frechet_pixels": {f"eta={e:g},S={s}": v for (e, s), v in scores.items()},
        "frechet_pixels_real": floor,
        "num_images": num_images,
        "training_seconds": trained,
        "seconds": time.perf_counter() - began,
        "train": dataclasses.asdict(train),
    }
    pictures = {
        "samples.png": plots.sample_table({k: v[:SHOWN] for k, v in cells.items()}, scores),
        "trajectory.png": _trajectory(explored),
        "loss.png": plots.loss_curve(read_metrics(run_folder / "metrics.jsonl")),
    }
    drawn = {name: plots.png_bytes(figure) for name, figure in pictures.items()}
    for name, png in drawn.items():
        write_whole(out / name, png)
    write_whole(out / "explorer.html", page_of(colour, COLOUR, explored).encode())
    write_whole(out / "results.json", (json.dumps(results, indent=2) + "\n").encode())
    html = _page(out, dataset, cells, scores, results, explored, drawn)
    write_whole(page, html.encode())  # last: it is finished
    return page


def draw_cells(
    model: Model,
    num_images: int,
    seed: int = 0,
    steps: Sequence[int] | None = None,
    etas: Sequence[float] | None = None,
) -> Cells:
    """Samples for every (η, S), the same x_T in each; one program for all of them.

    Args:
      model: the trained model.
      num_images: images a cell.
      seed: of x_T and of the noise.
      steps: the values of S, `STEPS` by default.
      etas: the values of η, `ETAS` by default.

    Returns:
      {(η, S): (n, H, W, C)}, pixels in [−1, 1].
    """
    steps, etas = STEPS if steps is None else steps, ETAS if etas is None else etas
    key, noise_key = jax.random.split(jax.random.key(seed))
    x_T = np.asarray(initial_noise(key, num_images, model.image_shape))
    cells = {}
    with tqdm(total=num_images * sum(steps) * len(etas), unit="call", unit_scale=True) as bar:
        walk = walker(model, image_keys(noise_key, num_images), lambda calls: None)
        for count in steps:
            tau = timesteps(model.schedule.num_steps, count)
            for eta in etas:
                parts = []
                for first in range(0, num_images, CHUNK):
                    part = x_T[first : first + CHUNK]
                    parts.append(np.asarray(walk(part, tau, ddim(eta), None, (), first)[0]))
                    bar.update(len(part) * count)
                cells[eta, count] = np.concatenate(parts)
    return cells


def score(images: np.ndarray, dataset: Dataset) -> float:
    """The Fréchet distance in pixel space of images in [−1, 1] to all of the data."""
    return frechet_distance(moments(images), moments(_pixels(dataset)))


def floor_of(dataset: Dataset, size: int, draws: int = 10) -> float:
    """What `size` images drawn from the data, with replacement, score on average against all of it.

    That is the expected distance of a perfect sampler of the data: few samples score high.
    """
    real, rng = _pixels(dataset), np.random.default_rng(0)
    whole = moments(real)
    some = (moments(real[rng.integers(0, len(real), size)]) for _ in range(draws))
    return float(np.mean([frechet_distance(part, whole) for part in some]))


def _pixels(dataset: Dataset) -> np.ndarray:
    return np.asarray(to_model(dataset.arrays()["image"]))


def _trajectory(explored: Exploration) -> plots.Figure:
    """Of three images with the most steps, at η = 0."""
    path = explored.paths[-1]
    x_t, x_0 = (states[0, 0, :3, :-1].swapaxes(0, 1) for states in (path.x_t, path.x_0))
    return plots.trajectory_strip(path.t[:-1], x_t, x_0)


def _explored() -> tuple[Model, Exploration]:
    """The model that ships, and what it draws."""
    model = load_model(COLOUR)
    numbers = class_numbers(CLASSES, model.config.num_classes, model.label_names)
    labels = np.array(numbers, np.int32)
    with tqdm(total=num_calls(COLOUR_STEPS, ETAS, PLACES), unit="call") as bar:
        return model, explore(
            model,
            CLASSES,
            labels,
            steps=COLOUR_STEPS,
            etas=ETAS,
            num_positions=PLACES,
            seed=COLOUR_SEED,
            update=bar.update,
        )


def _colour_panels(explored: Exploration) -> list[tuple[np.ndarray, str]]:
    """What each η and S drew: a row for each place, a column for each class."""
    columns = len(explored.names)
    return [
        (
            grid(path.x_0[i, :, :, -1].reshape(-1, *path.x_0.shape[-3:]), columns, gap=2, scale=4),
            f"{KINDS[eta]}, S = {count}",
        )
        for count, path in zip(explored.steps, explored.paths)
        for i, eta in enumerate(explored.etas)
    ]


def _page(
    out: pathlib.Path,
    dataset: Dataset,
    cells: Cells,
    scores: dict[tuple[float, int], float],
    results: dict,
    explored: Exploration,
    pictures: dict[str, bytes],
) -> str:
    train, count, floor = results["train"], results["num_images"], results["frechet_pixels_real"]
    panels = [
        (
            grid(cells[eta, s][:SHOWN], gap=6, scale=4),
            f"{KINDS[eta]}, S = {s}: {scores[eta, s]:.2f}",
        )
        for s in STEPS
        for eta in ETAS
    ]
    panels.append((grid(_pixels(dataset)[:SHOWN], gap=6, scale=4), f"Real digits: {floor:.2f}"))
    rows = [[KINDS[eta], *(f"{scores[eta, s]:.3f}" for s in STEPS), f"{floor:.3f}"] for eta in ETAS]
    best = min(scores.values())
    return plots.page(
        "DDIM in JAX: images in 5 to 50 steps",
        [
            f"<p>{COLOUR}, a network that ships with the package, draws {', '.join(CLASSES)}. "
            "Every panel starts from the same x_T: at η = 0 the same latents give the same images "
            "whatever S is, the number of steps. Down each column the way goes from one x_T to "
            "another.</p>",
            plots.panels_html(_colour_panels(explored), rows=len(ETAS), smooth=True),
            '<p><a href="explorer.html"><b>Open the explorer</b></a>: sliders for S, η, the path '
            "between two x_T and t, and images encoded and decoded.</p>",
            plots.figure_html(
                pictures["trajectory.png"],
                f"From noise to image: x_t and the prediction x̂_0 on the way down, η = 0, "
                f"S = {COLOUR_STEPS[-1]}.",
            ),
            "<h2>Digits, learned here</h2>",
            f"<p>A U-Net learned scikit-learn's 8×8 digits for {train['num_updates']:,} steps of "
            f"{train['batch_size']} images on this machine, then drew {count:,} digits for each S "
            f"and η. All of this page took {results['seconds']:.0f} seconds, training "
            f"{results['training_seconds']:.0f} of them.</p>",
            plots.panels_html(panels, rows=len(ETAS)),
            "<h2>Fréchet distance of the digits in pixel space</h2>",
            plots.table_html(["", *(f"S = {s}" for s in STEPS), "real"], rows),
            f"<p>Each figure is of {count:,} images against all {len(dataset):,} digits, in 64 "
            f"dimensions with pixels in [−1, 1]; less is better. {count:,} digits picked at random "
            f"from the real ones score {floor:.3f}: so many samples from a perfect model would "
            f"too. The best here is {best:.3f}.</p>",
            "<h2>Training</h2>",
            plots.figure_html(
                pictures["loss.png"], "The mean squared error of what the network predicts."
            ),
            "<h2>Next</h2>",
            plots.commands_html(
                {
                    f"ddim-jax sample {COLOUR} --label {CLASSES[0]} --num-images 16 --steps 20": (
                        "more in colour, a PNG"
                    ),
                    f"ddim-jax explore {out}/run": "sliders for the digits of the demo's network",
                    "ddim-jax train digits": "twice the training, and better: runs/digits",
                    f"ddim-jax info {out}/run": "the loss, the checkpoints and their health",
                }
            ),
            '<p class="note">After <code>make demo</code> the command is '
            "<code>.venv/bin/ddim-jax</code>.</p>",
        ],
    )
