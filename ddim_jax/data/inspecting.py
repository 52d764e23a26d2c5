"""What a data set holds, in words and in a contact sheet."""

import collections
import os
import pathlib

import numpy as np

from ddim_jax.data.folder import Choices, classes_of, most, refusals, sizes_of
from ddim_jax.data.index import Entry, index_folder, shown, some
from ddim_jax.data.sets import load, path_of, pictures_at
from ddim_jax.pictures.decoding import decode
from ddim_jax.pictures.images import crop_resize, grid

SHEET, SIDE = 64, 64  # pictures of a contact sheet, at most, and their sides in pixels
COUNTED = 100_000  # images up to which the labels of a data set are counted


def inspect(
    name: str | os.PathLike[str],
    split: str = "train",
    data_dir: str | os.PathLike[str] | None = None,
    *,
    labels: str | None = None,
    background: str | None = None,
) -> tuple[str, np.ndarray | None]:
    """What a data set holds, what of it would be refused and why, and a sheet of its pictures.

    Args:
      name, split, data_dir, labels, background: as in `load`; of a folder of pictures the split is
        the whole.

    Returns:
      Lines of text, and a contact sheet uint8 (H, W, 3) of pictures evenly spread over the set, the
      square in the middle of each; None where no picture can be used.

    Raises:
      FileNotFoundError, ValueError: as `load`; but files of a folder are named in the text.

    Example:
      >>> text, sheet = inspect("digits")
      >>> print(text)
      digits train: 1,797 images of 8×8×1
      classes       10: 178 of 0, 182 of 1, 177 of 2, 183 of 3, 181 of 4, 182 of 5, 181 of 6, ...
      >>> sheet.shape
      (521, 521, 3)
    """
    path = path_of(name, data_dir)
    if path is not None and pictures_at(path):
        return _folder(path, os.fspath(name), Choices(labels=labels, background=background))
    whole = load(name, split, data_dir, labels=labels, background=background)
    small = load(name, split, data_dir, thumbnail, labels=labels, background=background)
    shape = "×".join(map(str, whole.image_shape))
    lines = [f"{whole.name} {split}: {len(whole):,} images of {shape}"]
    if whole.num_classes is not None:
        said = str(whole.num_classes)
        if len(whole) <= COUNTED:
            parts = np.array_split(np.arange(len(whole)), -(-len(whole) // 1000))
            found = np.concatenate([small.take(part)["label"] for part in parts])
            said += ": " + _numbers(collections.Counter(map(str, found.tolist())))
        lines.append(f"classes       {said}")
    return "\n".join(lines), grid(small.take(_spread(len(small)))["image"])


def thumbnail(image: np.ndarray) -> np.ndarray:
    """uint8 (H, W, C) -> (SIDE, SIDE, C), the square in the middle; the small are enlarged."""
    times = max(1, SIDE // min(image.shape[:2]))
    return crop_resize(None, SIDE)(image.repeat(times, 0).repeat(times, 1))


def _folder(path: pathlib.Path, name: str, choices: Choices) -> tuple[str, np.ndarray | None]:
    index = index_folder(path)
    refused = refusals(index, choices)
    used = [entry for entry in index.entries if entry.path not in refused]
    kinds = [entry.kind for entry in used if entry.kind]
    size = sum(entry.size for entry in used) / 1e6
    lines = [f"{name}: {len(used):,} pictures, {size:,.3g} MB"]

    def line(word: str, text: str) -> None:
        if text:
            lines.append(f"{word:13} {text}")

    if kinds:
        line("sizes", most(sizes_of(kinds)))
        line("formats", most(collections.Counter(kind.format for kind in kinds)))
        line("pixels", most(collections.Counter(kind.mode for kind in kinds)))
        channels = choices.channels_of(kinds)
        grey = sum(kind.channels < channels for kind in kinds)
        more = f"; {grey:,} grey ones as R = G = B" if grey else ""
        if channels == 3 and not any(kind.coloured for kind in kinds):
            more = "; but none has colours: --data.channels 1 reads them as grey"
        line("read as", f"{'grey, 1 channel' if channels == 1 else 'colour, 3 channels'}{more}")
    line("turned", _counted(sum(kind.turned for kind in kinds), "upright by EXIF"))
    line("animated", _counted(sum(kind.frames > 1 for kind in kinds), "by their first frame"))
    clear = sum(not kind.opaque for kind in kinds)
    line("transparent", _counted(clear, f"on {choices.background}"))
    line("classes" if choices.labels else "folders", _classes(used, choices, index.entries, name))
    first = {entry.digest: entry.path for entry in reversed(used)}
    again = [entry.path for entry in used if first[entry.digest] != entry.path]
    line("twice", f"the same file as another: {some(again)}" if again else "")
    line("left out", f"no pictures by their names: {some(index.others)}" if index.others else "")
    line("hidden", _counted(index.hidden, "whose names begin with a dot, left out"))
    if len(sizes_of(kinds)) > 1:
        line("to train", "bring them to one size, as with --data.resize 32")
    line("index", str(index.kept))
    if refused:
        line("refused", f"{len(refused):,} of {len(index.entries):,} files:")
        lines += [f"  {shown(file)}: {why}" for file, why in refused.items()]
    if not used:
        return "\n".join(lines), None
    chosen = [used[i] for i in _spread(len(used))]
    pictures = [decode((path / e.path).read_bytes(), 3, choices.colour) for e in chosen]
    return "\n".join(lines), grid(np.stack([thumbnail(picture) for picture in pictures]))


def _classes(used: list[Entry], choices: Choices, entries: list[Entry], name: str) -> str:
    """How many pictures each first-level folder has."""
    counts = collections.Counter(e.path.split("/")[0] for e in used if "/" in e.path)
    if choices.labels:
        classes = classes_of(entries, choices.labels, name)
        return _numbers(collections.Counter({each: counts[each] for each in classes}))
    advice = " (--data.labels folders makes them classes)"
    return _numbers(counts) + advice if len(counts) > 1 else ""


def _numbers(counts: collections.Counter[str]) -> str:
    """How often each thing is there, in the order of the things."""
    listed = sorted(counts.items(), key=lambda item: (item[0].isdigit() and len(item[0]), item))
    said = ", ".join(f"{number:,} of {shown(thing)}" for thing, number in listed[:20])
    return said + (f", … ({len(listed)} in all)" if len(listed) > 20 else "")


def _counted(number: int, what: str) -> str:
    return f"{number:,}, {what}" if number else ""


def _spread(size: int) -> np.ndarray:
    """Up to SHEET indices of `size`, evenly spread."""
    count = min(SHEET, size)
    return np.arange(count) * size // count
