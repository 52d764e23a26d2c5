"""`ddim-jax explore`."""

from __future__ import annotations

import pathlib

import numpy as np
import tyro
from tqdm import tqdm

from ddim_jax.cli.options import SourceOptions, check_writable
from ddim_jax.data import Dataset, load
from ddim_jax.data.sets import HUGGING_FACE
from ddim_jax.generation.condition import condition
from ddim_jax.generation.exploring import (
    ETAS,
    STEPS,
    Originals,
    check,
    explore_page,
    no_labels,
    num_calls,
    of_dataset,
    usual_number,
)
from ddim_jax.pictures.decoding import decode
from ddim_jax.pictures.images import crop_resize, save_new
from ddim_jax.training.presets import learned_from
from ddim_jax.weights import Model


def explore(
    source: SourceOptions,
    model: tyro.conf.Positional[str] = "cifar10-small",
    out: pathlib.Path | None = None,
    labels: tuple[str, ...] | None = None,
    data: str | None = None,
    data_dir: pathlib.Path | None = None,
    images: tuple[pathlib.Path, ...] | None = None,
    num_images: int | None = None,
    steps: tuple[int, ...] | None = None,
    etas: tuple[float, ...] = ETAS,
    positions: int | None = None,
    frames: int | None = None,
    seed: int = 0,
    overwrite: bool = False,
) -> None:
    """Make one HTML file with sliders for S, η, the path between two x_T, and t.

    ddim-jax explore cifar10-small, then open cifar10-small.html in a browser: it needs no server
    and no network. Images, too, are encoded and decoded again, beside the originals. That takes
    minutes on a CPU; of digits-labels it takes seconds.

    Args:
      model: see `sample`.
      out: the file; by default named after the model, in the current folder.
      labels: classes of the images in turn, by name or number, or none; by default all.
      data: the originals to encode are the first images of this data set, as of train --data.name;
        by default of the model's own, if it is at hand, else what the model drew.
      data_dir: where TFDS data sets lie; default $DDIM_JAX_DATA, else TFDS's own.
      images: or these picture files: the centre square of each, brought to the model's size.
      num_images: how many are drawn, and encoded of the data; by default 10 up to 16×16 pixels,
        else 5.
      steps: the values of S, by default 5 10 20 50.
      etas: the values of η.
      positions: places on the path, by default 9 up to 16×16 pixels, else 5.
      frames: states kept on the way from x_T, by default 8 up to 16×16 pixels, else 5.
      seed: of x_T and of the noise.
      overwrite: replace the file if it exists.
    """
    out = _out(model, out, overwrite)
    if data is not None and images is not None:
        raise ValueError("--data and --images both say what to encode: give one of them")
    loaded = source.load(model)
    usual = usual_number(loaded)
    num_images = usual.images if num_images is None else num_images
    positions = usual.positions if positions is None else positions
    frames = usual.frames if frames is None else frames
    if steps is None:
        steps = tuple(count for count in STEPS if count <= loaded.schedule.num_steps)
    if num_images < 1 or not 0 <= seed < 2**32:
        raise ValueError(f"need an image and a seed in 0..2**32 - 1, got {num_images} and {seed}")
    check(loaded, steps, etas, positions, frames)
    classes = getattr(loaded.config, "num_classes", None)
    every = labels == ("all",) or (labels is None and classes)
    drawn = condition(loaded, "all" if every else labels)
    originals = _originals(loaded, data, data_dir, images, num_images)
    with tqdm(total=num_calls(steps, etas, positions), unit="call", desc="drawing") as bar:
        page = explore_page(
            loaded,
            pathlib.Path(model).name,
            drawn.of(np.arange(num_images)),
            originals,
            num_images=num_images,
            steps=steps,
            etas=etas,
            num_positions=positions,
            num_frames=frames,
            seed=seed,
            update=bar.update,
        ).encode()
    save_new(out, page, overwrite)
    print(f"wrote {out}, {len(page) / 1e6:.1f} MB: open it in a browser")


def _out(model: str, out: pathlib.Path | None, overwrite: bool) -> pathlib.Path:
    """The file to write; an error where it is not to be."""
    out = pathlib.Path(f"{pathlib.Path(model).resolve().stem}.html") if out is None else out
    if out.suffix.lower() not in (".html", ".htm"):
        raise ValueError(f"--out must end in .html, the format written, got {out}")
    if out.exists() and not overwrite:
        raise FileExistsError(f"{out} exists; choose another --out, or pass --overwrite")
    check_writable(out)
    return out


def _originals(
    model: Model,
    data: str | None,
    data_dir: pathlib.Path | None,
    files: tuple[pathlib.Path, ...] | None,
    count: int,
) -> Originals | None:
    """What to encode; None where nothing is at hand."""
    if files is not None:
        if not files:
            raise ValueError("--images needs a file")
        pixels = np.stack([_picture(file, model) for file in files])
        names = [file.stem for file in files]
        return Originals(pixels, no_labels(model, len(files)), names, "The originals are yours.")
    if data is not None:
        dataset = load(data, data_dir=data_dir)
        if dataset.image_shape != model.image_shape:
            raise ValueError(
                f"{data} has images of {dataset.image_shape}, the model of {model.image_shape}: "
                "give files with --images, which are cropped and resized"
            )
    else:
        found = _own_data(model, data_dir)
        if found is None:
            return None
        dataset = found
    return of_dataset(model, dataset, count)


def _own_data(model: Model, data_dir: pathlib.Path | None) -> Dataset | None:
    """What the model learned from, where it is at hand without code or a download, as it was."""
    own = learned_from(model.facts)
    if own is None or own.name.startswith(HUGGING_FACE):
        return None
    try:
        dataset = own.load(data_dir)
    except (TypeError, ValueError, OSError, ModuleNotFoundError):
        return None
    return dataset if dataset.image_shape == model.image_shape else None


def _picture(file: pathlib.Path, model: Model) -> np.ndarray:
    height, width, channels = model.image_shape
    if height != width:
        raise ValueError(f"--images are cut to squares, and the model's are {height}×{width}")
    try:
        pixels = decode(file.read_bytes(), channels)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None
    return crop_resize(None, height)(pixels)
