"""Reference statistics: a data set's features, kept in a file together with what they are of."""

from __future__ import annotations

import hashlib
import json
import os
import pathlib
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from tqdm import tqdm

from ddim_jax.evaluation._npz import load_npz, save_npz
from ddim_jax.evaluation.extractors import Extractor, features
from ddim_jax.evaluation.frechet import Moments, moments, unpack
from ddim_jax.storage.files import differences

if TYPE_CHECKING:
    from ddim_jax.data import Dataset

KIND = "reference statistics"
SHIPPED = pathlib.Path(__file__).parent / "cifar10" / "train-resnet56.npz"


class Reference(NamedTuple):
    """What samples are compared with."""

    moments: Moments  # of all images
    features: np.ndarray  # (m, d) float32, of a random subset, for kernel distance and recall
    facts: dict[str, Any]  # provenance: data, number, image_shape, pixels, extractor, ...


def reference_facts(dataset: Dataset, extractor: Extractor, keep: int = 10_000) -> dict[str, Any]:
    """The provenance by which a reference file is recognised; every difference counts.

    Args:
      dataset: from `ddim_jax.data.load`.
      extractor: what gives the features.
      keep: features kept besides the moments, at most one per image.

    Returns:
      A JSON-able dict. "pixels" is a hash of 16 images spread over the data set, which tells
      other crops, sizes and orders apart.

    Example:
      >>> from ddim_jax.data import load
      >>> from ddim_jax.evaluation.extractors import pixels
      >>> facts = reference_facts(load("digits"), pixels())
      >>> facts["number"], facts["image_shape"], facts["extractor"], facts["kept"]
      (1797, [8, 8, 1], 'pixels', 1797)
    """
    some = dataset.take(np.linspace(0, len(dataset) - 1, 16).astype(int))["image"]
    facts = {
        "data": dict(dataset.provenance),
        "number": len(dataset),
        "image_shape": list(dataset.image_shape),
        "pixels": hashlib.sha256(np.ascontiguousarray(some).tobytes()).hexdigest(),
        "kept": min(keep, len(dataset)),
        **extractor_facts(extractor),
    }
    return json.loads(json.dumps(facts))  # as it will come back from the file


def extractor_facts(extractor: Extractor) -> dict[str, str]:
    """The part of the provenance that samples must share."""
    return {
        "extractor": extractor.name,
        "digest": extractor.digest,
        "preprocessing": extractor.preprocessing,
    }


def reference_statistics(
    path: str | os.PathLike[str],
    dataset: Dataset,
    extractor: Extractor,
    *,
    keep: int = 10_000,
    batch_size: int = 100,
    save_every: int = 5_000,
    progress: bool = False,
) -> Reference:
    """The statistics of a data set, from the file if they are there, else computed and saved.

    What is computed is saved as it grows, beside `path` in "<path>.partial"; killed and called
    again, it continues, and the result is the same to the last bit for the same
    `save_every`.

    Args:
      path: an `.npz` file; its directory must exist.
      dataset: from `ddim_jax.data.load`, with the crop and size that the samples have.
      extractor: from `ddim_jax.evaluation.extractors`.
      keep: features of a random subset that are kept for kernel distance and precision/recall.
      batch_size: images at a time.
      save_every: images between two savings.
      progress: whether to show a bar.

    Returns:
      `Reference`.

    Raises:
      ValueError: the file is of other data, another extractor or another `keep`; each difference
        is named. Or `keep` < 2.

    Example:
      >>> import tempfile
      >>> from ddim_jax.data import load
      >>> from ddim_jax.evaluation.extractors import pixels
      >>> path = tempfile.mkdtemp() + "/digits.npz"
      >>> reference = reference_statistics(path, load("digits"), pixels(), keep=500)
      >>> reference.moments.size, reference.features.shape
      (1797, (500, 64))
    """
    if keep < 2 or save_every < 1:
        raise ValueError(f"keep must be >= 2 and save_every >= 1, got {keep} and {save_every}")
    facts = reference_facts(dataset, extractor, keep)
    path, partial = pathlib.Path(path), pathlib.Path(f"{path}.partial")
    if path.exists():
        return _matching(path, facts)
    done, total, kept = 0, None, np.zeros((0, 0), np.float32)
    if partial.exists():
        total, kept, _ = _matching(partial, facts)
        done = total.size
    chosen = np.zeros(len(dataset), bool)
    chosen[np.random.default_rng(0).permutation(len(dataset))[: facts["kept"]]] = True
    size = len(dataset)
    with tqdm(
        total=size, initial=done, unit="image", desc="reference", delay=1, disable=not progress
    ) as bar:
        while done < size:
            indices = np.arange(done, min(done + save_every, size))
            batches = np.split(indices, range(batch_size, len(indices), batch_size))
            images = (dataset.take(batch)["image"] for batch in batches)
            parts = []
            for part in features(extractor, images, batch_size):
                parts.append(part)
                bar.update(len(part))
            new = np.concatenate(parts)
            total = moments(new) if total is None else total.merge(moments(new))
            kept = np.concatenate([kept.reshape(-1, new.shape[1]), new[chosen[indices]]])
            done += len(indices)
            _save(partial, Reference(total, kept, facts))
    os.replace(partial, path)
    return _matching(path, facts)


def load_reference(path: str | os.PathLike[str]) -> Reference:
    """Reads what `reference_statistics` saved.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is damaged, holds something else, or is of a newer format.
    """
    header, arrays = load_npz(path, KIND)
    total = unpack(path, header, arrays)
    kept, facts = arrays.get("features"), header.get("facts")
    if (
        not isinstance(facts, dict)
        or kept is None
        or kept.dtype != np.float32
        or kept.ndim != 2
        or kept.shape[1] != len(total.mean)
        or not np.isfinite(kept).all()
    ):
        raise ValueError(
            f"{path} holds no valid reference: it lacks its facts, or finite float32 features "
            f"(m, {len(total.mean)})"
        )
    return Reference(total, kept, facts)


def shipped_reference(name: str, split: str, extractor: Extractor) -> Reference | None:
    """The statistics that ship, if they are of these data and features; the data need not be there.

    They are of CIFAR-10's training images, whole, in the features of the ResNet-56 that ships, with
    the features of 2,000 random ones.

    Args:
      name: of the data set, as `ddim_jax.data.load` takes it.
      split: its split.
      extractor: from `ddim_jax.evaluation.extractors`.

    Example:
      >>> from ddim_jax.evaluation.extractors import pixels, resnet56
      >>> shipped_reference("cifar10", "train", resnet56()).moments.size
      50000
      >>> shipped_reference("cifar10", "train", pixels()) is None
      True
    """
    if (name.partition(":")[0], split) != ("cifar10", "train"):
        return None
    reference = load_reference(SHIPPED)
    same = extractor_facts(extractor).items() <= reference.facts.items()
    return reference if same else None


def _save(path: pathlib.Path, reference: Reference) -> None:
    header = {"size": reference.moments.size, "facts": reference.facts}
    arrays = {
        "mean": reference.moments.mean,
        "scatter": reference.moments.scatter,
        "features": reference.features,
    }
    save_npz(path, KIND, header, arrays, overwrite=True)


def _matching(path: pathlib.Path, facts: dict[str, Any]) -> Reference:
    """The reference in `path`, if it is of these facts."""
    reference = load_reference(path)
    if differ := differences(reference.facts, facts):
        raise ValueError(
            "\n".join([f"{path} is a reference of something else; choose another path:", *differ])
        )
    return reference
