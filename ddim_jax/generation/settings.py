"""What determines the images of a folder: its `settings.json`, and the shards that follow."""

from __future__ import annotations

import json
import os
import pathlib
import reprlib
from typing import Any

from ddim_jax.storage.files import differences, write_whole

FORMAT = 2  # 1 had the number of shards in their names
SETTINGS = "settings.json"


def read_settings(directory: str | os.PathLike[str]) -> dict[str, Any]:
    """The settings of a folder of `generate`: "num_images", "image_shape", "tau", "model", ….

    Raises:
      FileNotFoundError: it is no such folder.
      ValueError: `settings.json` is damaged, or from a newer version.
    """
    path = pathlib.Path(directory) / SETTINGS
    if not path.is_file():
        raise FileNotFoundError(
            f"{directory} is no folder of generated images: no {SETTINGS}, which ddim-jax generate "
            "writes"
        )
    try:
        settings: dict[str, Any] = json.loads(path.read_bytes())
        newer = settings["format"] > FORMAT
        if not newer:
            shards_of(settings)
            tuple(settings["image_shape"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged, or not of ddim_jax: {error!r}") from error
    if newer:
        raise ValueError(
            f"{path} has format {settings['format']}, this version reads up to {FORMAT}: "
            "update ddim_jax"
        )
    return settings


def claim(directory: pathlib.Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Makes the folder and its settings, or checks that they are the same, or lets it grow."""
    settings = json.loads(json.dumps(settings, allow_nan=False))  # as they will be read
    path = directory / SETTINGS
    directory.mkdir(parents=True, exist_ok=True)
    # Listed before looking for settings, which another process may be writing just now.
    names = {p.name for p in directory.iterdir() if p.suffix != ".tmp"}
    there = read_settings(directory) if path.exists() else None
    allowed = set() if there is None else {SETTINGS, *shards_of(there)}
    if there is not None:
        settings = _grown(directory, there, settings)
        allowed |= set(shards_of(settings))  # another process may have begun to let it grow
    if foreign := sorted(names - allowed):
        raise ValueError(
            f"{directory} holds files that are not of these images: {reprlib.repr(foreign)}; "
            "choose an empty folder"
        )
    if there != settings:
        write_whole(path, (json.dumps(settings, indent=2) + "\n").encode())
    return settings


def shards_of(settings: dict[str, Any]) -> dict[str, range]:
    """File name → the numbers of its images."""
    total, size = settings["num_images"], settings["shard_size"]
    ends = sorted({*range(size, total, size), *settings.get("earlier", []), total})
    of = f"-of-{len(ends):05d}" if settings["format"] == 1 else ""
    return {
        f"images-{i:05d}{of}.npy": range(start, end)
        for i, (start, end) in enumerate(zip([0, *ends], ends))
    }


def _grown(directory: pathlib.Path, there: dict[str, Any], now: dict[str, Any]) -> dict[str, Any]:
    """The settings of the folder with as many images as are asked for now."""
    had, wanted = there["num_images"], now["num_images"]
    earlier = [*there.get("earlier", []), *([had] if had < wanted else [])]
    if differ := differences(
        {**there, "num_images": max(had, wanted), "earlier": earlier}, {**now, "earlier": earlier}
    ):
        more = [f"(no image is removed: ask for {had} or more)"] if had > wanted else []
        raise ValueError(
            "\n".join(
                [f"{directory} holds images of other settings; choose another:", *differ, *more]
            )
        )
    return {**now, "earlier": earlier}
