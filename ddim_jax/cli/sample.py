"""`ddim-jax sample`."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import shlex
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import tyro
from tqdm import tqdm

from ddim_jax.cli.options import Source, SourceOptions, check_writable
from ddim_jax.cli.ways import DrawingOptions, Sampling, file_name
from ddim_jax.generation.condition import name_of
from ddim_jax.generation.drawing import batches_of, make_drawer
from ddim_jax.pictures.animation import SIDE, encode_animation
from ddim_jax.pictures.contact_sheet import Card, contact_sheet
from ddim_jax.pictures.images import encode_png, grid, save_new
from ddim_jax.storage.files import portable

FRAMES = 30  # at most, of an animation


def sample(
    model: tyro.conf.Positional[str],
    sampling: DrawingOptions,
    source: SourceOptions,
    num_images: int = 64,
    first: int = 0,
    batch_size: int | None = None,
    out: pathlib.Path | None = None,
    each: pathlib.Path | None = None,
    gif: pathlib.Path | None = None,
    webp: pathlib.Path | None = None,
    html: pathlib.Path | None = None,
    overwrite: bool = False,
) -> None:
    """Draw images with a trained model, and save them as one PNG, or as you say.

    Args:
      model: "cifar10-small" or "digits" (which ship; where a class is asked for the latter is
        "digits-labels"), a run folder, a .safetensors file, a PyTorch checkpoint in the names of
        the authors, of diffusers or of OpenAI, a diffusers folder, or any of these as org/name on
        the Hub.
      num_images: how many; image k is the same whatever their number.
      first: the number of the first image.
      batch_size: images at a time on each device, 16 by default or fewer if fewer are drawn. The
        images are the same, to the bit, on any number of devices; another size rounds differently.
      out: one PNG of all images; where no other file is asked for, it is named after the model and
        what is drawn, in the current folder.
      each: a folder for each image as a PNG of its own, named by its number and class.
      gif: the predictions x̂_0 on their way to the images, as an animation that repeats.
      webp: the same without loss of colours.
      html: a page of the images, each with the command that draws it again.
      overwrite: replace files that exist.
    """
    batch_size = min(16, num_images) if batch_size is None else batch_size
    if num_images < 1 or batch_size < 1:
        raise ValueError(f"need at least one image, got {num_images} in batches of {batch_size}")
    if not 0 <= first < first + num_images <= 2**31:
        raise ValueError(f"--first must be in 0..2**31 - num_images, got {first}")
    method = sampling.check()
    model = sampling.model(model)
    files = {"out": out, "gif": gif, "webp": webp, "html": html}
    for option, file in files.items():
        _check_file(option, file, overwrite)
    loaded = source.load(model)
    sampling.check_model(model, loaded)
    sampling = sampling.of(loaded)
    if each is None and not any(files.values()):
        number = f"-first{first}" if first else ""
        stem = f"{pathlib.Path(model).resolve().stem}{sampling.stem}{number}"
        out = pathlib.Path(f"{stem}.png")
        _check_file("out", out, overwrite)
    if loaded.image_shape[2] not in (1, 3):
        raise ValueError(
            f"images of {loaded.image_shape[2]} channels are no PNG (1 or 3 are): ddim-jax "
            "generate writes them as arrays"
        )
    condition = sampling.condition(loaded)
    numbers = np.arange(first, first + num_images, dtype=np.uint32)
    labels = condition.of(numbers)
    classes = [None] * num_images if labels is None else labels.tolist()
    names = [None if label is None else name_of(loaded, label) for label in classes]
    singles = [] if each is None else _single_files(each, numbers, names, overwrite)
    loaded, tau, method = sampling.stored(loaded, method)
    shown = _shown(num_images, loaded.image_shape) if gif or webp else 0
    keep = _kept(len(method(loaded.schedule, tau).t)) if shown else None
    draw, devices = make_drawer(
        loaded, tau, method, condition, sampling.seed, clip=sampling.clip, keep=keep
    )
    images: list[np.ndarray] = []
    paths: list[np.ndarray] = []
    with tqdm(total=num_images, unit="image", desc="compiling") as bar:
        for batch in batches_of(draw, numbers, batch_size, devices, bar):
            bar.set_description("drawing")
            paths.append(np.asarray(batch.path)[: max(0, shown - bar.n)])
            images.append(np.asarray(batch.images))
            bar.update(len(batch.images))
    drawn = _Drawn(np.concatenate(images), numbers, names, batch_size)
    facts = {"model": portable(model), **dataclasses.asdict(sampling), **source.given()}
    written = []

    def save(path: pathlib.Path, content: bytes, what: str) -> None:
        save_new(path, content, overwrite)
        written.append(f"{path}: {what}")

    if out:
        facts |= {"first": first} if first else {}
        png = encode_png(_tiled(drawn.images), {"ddim_jax": json.dumps(facts)})
        save(out, png, f"{num_images} images")
    for path, content in zip(singles, drawn.singles(facts)):
        save_new(path, content, overwrite)
    if each:
        written.append(f"{each}: {num_images} files, {singles[0].name} to {singles[-1].name}")
    if shown:
        states = [*np.concatenate(paths).swapaxes(0, 1), drawn.images[:shown]]
        frames = np.stack([_tiled(state) for state in states])
        for file in filter(None, (gif, webp)):
            what = f"{len(frames)} frames of {'the first ' * (shown < num_images)}{shown} images"
            save(file, encode_animation(frames, file.suffix.lower()[1:]), what)
    if html:
        page = drawn.page(model, sampling, source)
        save(html, page.encode(), f"a page of {num_images} images")
    print("\n".join(f"wrote {line}, {sampling}" for line in written))


class _Drawn(NamedTuple):
    """Images with their numbers and the names of their classes, if they have any."""

    images: np.ndarray  # (n, H, W, C) uint8
    numbers: np.ndarray
    names: list[str | None]
    batch_size: int

    def singles(self, facts: dict[str, Any]) -> Iterator[bytes]:
        """Each as a PNG."""
        for pixels, number, name in zip(self.images, self.numbers, self.names):
            own = facts | {"number": int(number), "class": name}
            yield encode_png(pixels, {"ddim_jax": json.dumps(own)})

    def page(self, model: str, sampling: Sampling, source: Source) -> str:
        """All of them as a page."""
        told = dataclasses.replace(sampling, label=None, labels=None)
        cards = []
        for pixels, number, name in zip(self.images, self.numbers, self.names):
            words = ["ddim-jax", "sample", portable(model), *source.words(), *sampling.words()]
            words += [] if name is None else ["--label", name]
            words += ["--first", str(number), "--num-images", "1"]
            command = shlex.join([*words, "--batch-size", str(self.batch_size)])
            title = f"image {number}" if name is None else f"image {number}, class {name}"
            cards.append(Card(pixels, title, str(told), command))
        title = f"{len(cards)} images of {portable(model)}"
        return contact_sheet(title, f"{sampling}. Numbers count from 0.", cards)


def _check_file(option: str, file: pathlib.Path | None, overwrite: bool) -> None:
    """Raises ValueError or OSError where the file is not to be written."""
    suffix = ".png" if option == "out" else f".{option}"
    if file is None:
        return
    if file.suffix.lower() != suffix:
        raise ValueError(f"--{option} must end in {suffix}, the format written, got {file}")
    if file.exists() and not overwrite:
        raise FileExistsError(f"{file} exists; choose another --{option}, or pass --overwrite")
    check_writable(file)


def _single_files(
    folder: pathlib.Path, numbers: np.ndarray, names: list[str | None], overwrite: bool
) -> list[pathlib.Path]:
    """A file for each image, none of which is there."""
    parts = [f"-{file_name(name)}" if name else "" for name in names]
    files = [folder / f"{number:05d}{part}.png" for number, part in zip(numbers, parts)]
    there = [file for file in files if file.exists()]
    if there and not overwrite:
        raise FileExistsError(
            f"{there[0]} exists, one of {len(there)}; choose another --each, or pass --overwrite"
        )
    check_writable(files[0])
    return files


def _kept(steps: int) -> np.ndarray:
    """(S,) bool: at most FRAMES − 1 steps, evenly, and not the last, whose x̂_0 is the image."""
    keep = np.zeros(steps, bool)
    keep[np.linspace(0, steps - 1, min(FRAMES, steps)).round().astype(int)[:-1]] = True
    return keep


def _tiled(images: np.ndarray) -> np.ndarray:
    return grid(images, scale=max(1, 64 // images.shape[1]))


def _shown(num_images: int, image_shape: tuple[int, int, int]) -> int:
    """How many of the images fit into an animation of SIDE pixels; one at least."""
    h, w, _ = image_shape
    fit = (SIDE - 1) // (max(h, w) * max(1, 64 // h) + 1)
    return max(1, min(num_images, fit**2))
