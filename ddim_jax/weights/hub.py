"""Models of the Hugging Face Hub: `org/name`, as far as a network and its sampler need them.

Where the files go, who may have them and whether the network is used at all is as huggingface_hub
has it: HF_HOME, HF_TOKEN, HF_HUB_OFFLINE, HF_ENDPOINT and the rest of its variables.
"""

from __future__ import annotations

import contextlib
import os
import pathlib
import re
import shlex
from collections.abc import Callable, Collection, Iterator
from typing import Any, NamedTuple

from ddim_jax.weights.containers import few
from ddim_jax.weights.diffusers_files import read_index
from ddim_jax.weights.hub_files import FILES, needed


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
      check: is called with the path of a diffusers model before its weights are downloaded.

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

    def get(name: str) -> pathlib.Path:
        with _plainly(hub, repo, revision):
            path = hub.hf_hub_download(
                repo, name, token=token, local_files_only=bool(offline), **where
            )
            return pathlib.Path(path)

    try:
        if offline and not names:
            raise FileNotFoundError("it is not there")
        with _of_the_cache(bool(offline)):
            need = needed(names, **asked)
        for name in need.settings:
            snapshot = get(name).parents[name.count("/")]
        if need.settings:
            check(snapshot / need.model)
        weights = get(need.weights)
        beside = need.weights.removesuffix(weights.name)
        for shard in read_index(weights) if need.shards else ():
            if get(beside + shard).parent != weights.parent:
                raise ValueError("it was changed meanwhile: begin again")
    except ValueError as error:
        raise ValueError(f"{repo} on the Hub: {error}") from error
    except (FileNotFoundError, ConnectionError) as error:
        if not offline and isinstance(error, FileNotFoundError):
            said = f"{error}" if repo in f"{error}" else f"{repo} on the Hub: {error}"
            raise FileNotFoundError(said) from error
        cause = offline or "in the middle of it"
        raise ConnectionError(_unreachable(hub, repo, asked, where, cause, error)) from error
    snapshot = weights.parents[need.weights.count("/")]
    facts = {"repository": repo, "commit": snapshot.name, "file": need.weights}
    return Fetched(snapshot / need.model, {"hub": facts})


def check_push(repo: str, names: Collection[str], overwrite: bool = False) -> None:
    """Whether `push` may write there, before any long work.

    Args:
      repo: "org/name".
      names: of the files to come.
      overwrite: replace files of these names, and add to a repository that holds others.

    Raises:
      FileExistsError: the repository holds files, and `overwrite` is False.
      PermissionError: there is no token, or it is not a good one.
    """
    hub = _package(repo)
    try:
        with _plainly(hub, repo, None):
            hub.HfApi().whoami()
    except PermissionError as error:
        raise PermissionError(f"cannot write to {repo}: {error}") from error
    try:
        with _plainly(hub, repo, None):
            files = hub.HfApi().model_info(repo).siblings or []
            there = {file.rfilename for file in files} - {".gitattributes"}
    except FileNotFoundError:
        return
    if there and not overwrite:
        same = sorted(there & {*names}) or sorted(there)
        raise FileExistsError(
            f"{repo} on the Hub holds {few(same)}; choose another name, or pass --overwrite"
        )


def push(path: pathlib.Path, repo: str, private: bool = False) -> str:
    """Puts a folder's files, or one file, into a repository of the Hub, made if there is none.

    Args:
      path: the folder or file.
      repo: "org/name"; see `check_push`.
      private: of a new one; else as the account has it, which is mostly public.

    Returns:
      Its address.
    """
    api = _package(repo).HfApi()
    with _plainly(_package(repo), repo, None):
        address = api.create_repo(repo, private=private or None, exist_ok=True)
        if path.is_dir():
            api.upload_folder(repo_id=repo, folder_path=path)
        else:
            api.upload_file(path_or_fileobj=path, path_in_repo=path.name, repo_id=repo)
    return str(address)


def _listed(
    hub: Any, repo: str, token: str | bool | None, where: dict[str, Any]
) -> tuple[list[str], str]:
    """(names of the files, ""), or what the cache has of them and why the Hub was not asked."""
    try:
        with _plainly(hub, repo, where["revision"]):
            timeout = hub.constants.HF_HUB_ETAG_TIMEOUT
            info = hub.HfApi().model_info(
                repo, revision=where["revision"], token=token, timeout=timeout
            )
            return [file.rfilename for file in info.siblings or []], ""
    except ConnectionError as error:
        reason = str(error)
    try:
        folder = pathlib.Path(
            hub.snapshot_download(repo, **where, local_files_only=True, allow_patterns=["/none"])
        )
    except (OSError, ValueError):
        return [], reason
    return [p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()], reason


@contextlib.contextmanager
def _of_the_cache(offline: bool) -> Iterator[None]:
    """What the cache lacks, the Hub may have."""
    try:
        yield
    except ValueError as error:
        if offline:
            raise FileNotFoundError(str(error)) from error
        raise


@contextlib.contextmanager
def _plainly(hub: Any, repo: str, revision: str | None) -> Iterator[None]:
    """What the package raises, as errors of Python that say what to do."""
    login = "give a token that may: HF_TOKEN, `hf auth login`, or token="
    try:
        yield
    except hub.errors.HFValidationError as error:
        raise ValueError(
            f"{repo!r} is neither a path here nor a name of the Hub: {error}"
        ) from None
    except hub.errors.GatedRepoError as error:
        raise PermissionError(
            f"{repo} is gated: accept its terms at https://huggingface.co/{repo}, and {login}"
        ) from error
    except hub.errors.RevisionNotFoundError as error:
        raise FileNotFoundError(f"{repo} on the Hub has no revision {revision!r}") from error
    except hub.errors.RepositoryNotFoundError as error:
        raise FileNotFoundError(
            f"no model {repo!r}: there is no such file or folder here, and on the Hub none of that "
            f"name that is public or yours; for a private one {login}"
        ) from error
    except hub.errors.LocalTokenNotFoundError as error:
        raise PermissionError(f"there is no token: {login}") from error
    except hub.errors.LocalEntryNotFoundError as error:
        raise ConnectionError(_first_line(error)) from error
    except hub.errors.EntryNotFoundError as error:
        raise FileNotFoundError(f"a file of it is gone: {_first_line(error)}") from error
    except Exception as error:  # of the HTTP library that it uses, which one depends on its version
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status in (401, 403):
            raise PermissionError(f"the Hub refuses {repo} ({status}): {login}") from error
        if status is not None:
            raise ConnectionError(f"it answers {status}") from error
        if isinstance(error, OSError) and error.errno is not None and "onnect" not in repr(error):
            raise  # of this machine's files
        raise ConnectionError(_first_line(error)) from error


def _first_line(error: Exception) -> str:
    line = str(error).strip().partition("\n")[0] or type(error).__name__
    return line if len(line) <= 160 else f"{line[:160]}…"


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
        weights = [f"{inside}/{kind}".lstrip("/") for kind in ("*.safetensors", "*.bin")]
        for pattern in ("*.json", *weights):
            words += ["--include", pattern]
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
            f"{repo!r} is no file or folder here; as a name on the Hugging Face Hub it needs their "
            "package: pip install 'ddim_jax[hub]' (or pip install huggingface_hub)"
        ) from error
    return huggingface_hub
