"""Models of the Hugging Face Hub: `org/name`, as far as a network and its sampler need them.

Where the files go, who may have them and whether the network is used at all is as huggingface_hub
has it: HF_HOME, HF_TOKEN, HF_HUB_OFFLINE, HF_ENDPOINT and the rest of its variables.
"""

from __future__ import annotations

import os
import pathlib
import re
import shlex
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

from ddim_jax.weights.diffusers_files import WeightsFile, choose, read_index, weights_file

FILES = (".safetensors", ".ckpt", ".pt", ".pth", ".bin")
SCHEDULERS = ("scheduler/scheduler_config.json", "scheduler_config.json")


class Needed(NamedTuple):
    """What of a repository is to be downloaded."""

    model: str  # the folder, or the file, that is the model
    settings: list[str]  # small files that it needs
    weights: str
    shards: WeightsFile | None = None  # the weights, where they are an index


class Fetched(NamedTuple):
    """A model in the cache."""

    path: pathlib.Path
    facts: dict[str, Any]  # which repository, and the commit of it


def is_hub_name(source: object) -> bool:
    """Whether it is written `org/name`, and is no file or folder here.

    Example:
      >>> is_hub_name("google/ddpm-cifar10-32"), is_hub_name("runs/mine.safetensors")
      (True, False)
    """
    if not isinstance(source, str) or not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", source):
        return False
    return not source.endswith(FILES) and not os.path.exists(source)


def needed(
    names: Collection[str],
    subfolder: str | None = None,
    filename: str | None = None,
    variant: str | None = None,
) -> Needed:
    """The files of a repository that one model needs.

    Args:
      names: of all its files.
      subfolder: where in it to look.
      filename: the file that is the model; else a diffusers folder (with unet/ in it, or itself
        one), or the only .safetensors file, or the only checkpoint of PyTorch.
      variant: of the weights of a diffusers folder.

    Returns:
      `Needed`.

    Raises:
      FileNotFoundError: it has no such file or folder, or no model.
      ValueError: it has several.

    Example:
      >>> needed(
      ...     [
      ...         "README.md",
      ...         "unet/config.json",
      ...         "unet/diffusion_pytorch_model.bin",
      ...         "unet/diffusion_pytorch_model.safetensors",
      ...         "scheduler/scheduler_config.json",
      ...     ]
      ... )
      Needed(model='', settings=['unet/config.json', 'scheduler/scheduler_config.json'],
             weights='unet/diffusion_pytorch_model.safetensors', shards=None)
    """
    root = f"{subfolder.strip('/')}/" if subfolder else ""
    beside = sorted(name.removeprefix(root) for name in names if name.startswith(root))
    if not beside:
        raise FileNotFoundError(f"it has no folder {root!r}; it has {_few(names)}")
    if filename is not None:
        if filename not in beside:
            raise FileNotFoundError(f"it has no file {root + filename!r}; it has {_few(names)}")
        folder, _, file = filename.rpartition("/")
        if weights_file(file) is None or f"{folder}/config.json".lstrip("/") not in beside:
            return Needed(root + filename, [], root + filename)
        inner = f"{root}{folder}/" if folder else root
        return _diffusers(names, inner, [file], variant, root + filename)
    for inner in ("unet/", ""):
        files = [n.removeprefix(inner) for n in beside if n.startswith(inner)]
        if "config.json" in files and any(weights_file(name) for name in files):
            files = [name for name in files if "/" not in name]
            return _diffusers(names, root + inner, files, variant, root)
    for ends in (".safetensors", FILES[1:]):
        found = [name for name in beside if name.endswith(ends) and "/" not in name]
        if len(found) == 1:
            return Needed(root + found[0], [], root + found[0])
        if found:
            raise ValueError(
                f"it has {len(found)} files of weights: choose one of {_few(found)} by "
                f"filename={found[0]!r}, or --filename {found[0]}"
            )
    raise FileNotFoundError(
        f"it has no model that is read here: no unet/config.json or config.json with weights "
        f"beside, and no file {', '.join(FILES)}; it has {_few(names)}"
    )


def _diffusers(
    names: Collection[str], inner: str, files: list[str], variant: str | None, model: str
) -> Needed:
    """A `UNet2DModel` in the folder `inner`, its weights one of `files`."""
    chosen = choose(files, variant)
    outer = re.sub(r"(^|/)unet/$", r"\1", inner)
    settings = [f"{inner}config.json", *(outer + name for name in SCHEDULERS)]
    settings += [f"{inner}scheduler_config.json", f"{outer}model_index.json"]
    kept = [name for name in dict.fromkeys(settings) if name in names]
    return Needed(model, kept, inner + chosen.name, chosen if chosen.is_index else None)


def fetch(
    repo: str,
    *,
    subfolder: str | None = None,
    filename: str | None = None,
    variant: str | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    check: Callable[[pathlib.Path], object] = str,
) -> Fetched:
    """Downloads what is not in the cache of one model, and says where it lies.

    Args:
      repo: "org/name".
      subfolder: see `needed`.
      filename: see `needed`.
      variant: see `needed`.
      revision: a branch, tag or commit; by default the main branch.
      token: see huggingface_hub; by default the one of HF_TOKEN or of `hf auth login`.
      cache_dir: see huggingface_hub.
      check: is called with the folder of config.json before the weights are downloaded.

    Returns:
      `Fetched`.

    Raises:
      ModuleNotFoundError: huggingface_hub is not installed.
      FileNotFoundError: there is no such repository, revision or file.
      PermissionError: it is gated, or private.
      ConnectionError: the Hub cannot be reached, and the cache does not hold what is needed.
      ValueError: see `needed`.
    """
    hub = _package(repo)
    where = {"revision": revision, "cache_dir": cache_dir}
    asked = {"subfolder": subfolder, "filename": filename, "variant": variant}
    names, offline = _listed(hub, repo, token, where)
    try:
        if offline and not names:
            raise FileNotFoundError("the cache does not have it")
        need = needed(names, **asked)
        get = lambda name: _download(hub, repo, name, token, where, bool(offline))  # noqa: E731
        for name in need.settings:
            config = get(name)
            if config.name == "config.json":
                check(config.parent)
        weights = get(need.weights)
        snapshot = weights.parents[need.weights.count("/")]
        for shard in read_index(weights) if need.shards else ():
            if get(need.weights.replace(weights.name, shard)).parent != weights.parent:
                raise ValueError("it was changed meanwhile: begin again")
    except (FileNotFoundError, ValueError) as error:
        if isinstance(error, FileNotFoundError) and offline:
            raise ConnectionError(_unreachable(hub, repo, asked, where, offline, error)) from error
        raise type(error)(f"{repo} on the Hub: {error}") from error
    facts = {"repository": repo, "commit": snapshot.name}
    return Fetched(snapshot / need.model, {"hub": facts | {"file": need.weights}})


def _listed(
    hub: Any, repo: str, token: str | bool | None, where: dict[str, Any]
) -> tuple[list[str], str]:
    """(names of the files, ""), or what the cache has of them and why the Hub was not asked."""
    revision = where["revision"]
    try:
        info = hub.HfApi().model_info(
            repo, revision=revision, token=token, timeout=hub.constants.HF_HUB_ETAG_TIMEOUT
        )
        return [file.rfilename for file in info.siblings or []], ""
    except hub.errors.HFValidationError as error:
        raise ValueError(
            f"{repo!r} is neither a path here nor a name of the Hub: {error}"
        ) from None
    except hub.errors.GatedRepoError as error:
        raise PermissionError(
            f"{repo} is gated: accept its terms at https://huggingface.co/{repo}, and give a token "
            "of yours as HF_TOKEN, by `hf auth login`, or as token="
        ) from error
    except hub.errors.RevisionNotFoundError as error:
        raise FileNotFoundError(f"{repo} on the Hub has no revision {revision!r}") from error
    except hub.errors.RepositoryNotFoundError as error:
        raise FileNotFoundError(
            f"no model {repo!r}: there is no such file or folder here, and on the Hub none of that "
            "name that is public or yours. A private one needs a token of yours: HF_TOKEN, "
            "`hf auth login`, or token="
        ) from error
    except hub.errors.HfHubHTTPError as error:
        status = getattr(error.response, "status_code", 0)
        if status in (401, 403):
            raise PermissionError(
                f"the Hub refuses {repo} to this token ({status}): give another as HF_TOKEN, by "
                "`hf auth login`, or as token="
            ) from error
        reason = f"it answers {status}"
    except Exception as error:  # of whichever HTTP library it uses
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    try:
        folder = pathlib.Path(
            hub.snapshot_download(repo, **where, local_files_only=True, allow_patterns=["/none"])
        )
    except (OSError, ValueError):
        return [], reason
    return [p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()], reason


def _download(
    hub: Any, repo: str, name: str, token: str | bool | None, where: dict[str, Any], offline: bool
) -> pathlib.Path:
    try:
        path = hub.hf_hub_download(repo, name, token=token, local_files_only=offline, **where)
    except hub.errors.EntryNotFoundError as error:
        raise FileNotFoundError(f"it has no {name!r} now: {error}") from error
    return pathlib.Path(path)


def _unreachable(
    hub: Any,
    repo: str,
    asked: dict[str, str | None],
    where: dict[str, Any],
    reason: str,
    error: Exception,
) -> str:
    folder = repo.split("/")[1]
    inside = "/".join(part for part in (asked["subfolder"], asked["filename"]) if part)
    words = ["hf", "download", repo]
    if asked["filename"]:
        words += [inside]
    else:
        for pattern in ("*.json", "*.safetensors", "*.bin"):
            words += ["--include", f"{inside}/{pattern}".lstrip("/")]
    if where["revision"]:
        words += ["--revision", where["revision"]]
    path = f"{folder}/{inside}" if inside else folder
    return (
        f"no model {repo!r}: there is no such file or folder here, the Hub cannot be reached "
        f"({reason}), and in {where['cache_dir'] or hub.constants.HF_HUB_CACHE}: {error}. Where "
        f"there is a network, run\n  {shlex.join([*words, '--local-dir', folder])}\n"
        f"bring the folder here, and name {path!r} in place of {repo!r}"
    )


def _package(repo: str) -> Any:
    try:
        import huggingface_hub
        import huggingface_hub.constants
        import huggingface_hub.errors
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"no model {repo!r}: there is no such file or folder here; as a model of the Hugging "
            "Face Hub it needs their package: pip install 'ddim_jax[hub]' (or pip install "
            "huggingface_hub)"
        ) from error
    return huggingface_hub


def _few(names: Collection[str]) -> str:
    ordered = sorted(names)
    return ", ".join(ordered[:8]) + (", …" if len(ordered) > 8 else "")
