"""What a folder of pictures holds: found once, kept in a cache, known again by its content.

The cache is $DDIM_JAX_CACHE, else $XDG_CACHE_HOME/ddim_jax/data, else ~/.cache/ddim_jax/data; the
folder itself is never written to. A file is read again where its size or time of change differs.
What was read under each digest is kept too, so that a changed folder can be compared file by file.
"""

import hashlib
import json
import os
import pathlib
import stat
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import PIL
from PIL import Image
from tqdm import tqdm

from ddim_jax.data.reader import reason
from ddim_jax.pictures.decoding import Kind, examine
from ddim_jax.storage.files import write_whole

CACHE_VARIABLE = "DDIM_JAX_CACHE"
SUFFIXES = {
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".dib", ".tif", ".tiff", ".gif"),
}
CHUNK = 32  # files that a thread takes at a time
BLOCK = 50_000  # files after which the index is kept


class Entry(NamedTuple):
    """One file that is a picture by its name."""

    path: str  # in the folder, with "/"
    size: int  # in bytes
    mtime_ns: int  # when it was last written
    digest: str  # of its bytes; "" where they could not be read
    kind: Kind | None
    error: str  # why it is no picture; "" where it is one


class Index(NamedTuple):
    """What a folder holds."""

    entries: list[Entry]  # in the order of the bytes of their paths
    others: list[str]  # no pictures by their names
    hidden: int  # names that begin with a dot
    kept: pathlib.Path  # where the index is kept


def cache_folder() -> pathlib.Path:
    """Where indices are kept."""
    if named := os.environ.get(CACHE_VARIABLE):
        return pathlib.Path(named).expanduser()
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return pathlib.Path(home).expanduser() / "ddim_jax" / "data"


def shown(path: str) -> str:
    """A path as it can be printed, whatever bytes its name has.

    Example:
      >>> shown("a b.png"), shown("a\\nb.png")
      ('a b.png', "'a\\\\nb.png'")
    """
    return path if path.isprintable() else ascii(path)


def index_folder(folder: pathlib.Path) -> Index:
    """Looks at each file of a folder, but for those that have not changed since the last time.

    Raises:
      OSError: the folder cannot be listed.
    """
    name = hashlib.sha256(os.fsencode(folder.resolve())).hexdigest()[:32]
    kept = cache_folder() / f"{name}.json"
    known = _kept_entries(kept)
    found, others, hidden = [], [], 0
    for path, entry in _walk(folder):
        if entry is None:
            hidden += 1
        elif entry.error or os.path.splitext(path)[1].lower() in SUFFIXES:
            found.append(entry)
        else:
            others.append(path)
    found.sort(key=lambda entry: os.fsencode(entry.path))
    entries = [known[entry.path] if _same(known, entry) else entry for entry in found]
    new = [i for i, entry in enumerate(entries) if not entry.error and not entry.digest]

    def keep() -> None:
        done = [entry for entry in entries if entry.digest or entry.error]
        _keep(kept, {"pillow": PIL.__version__, "folder": ascii(folder), "entries": done})

    looked = look(lambda i: (folder / entries[i].path).read_bytes(), new, f"looking at {folder}")
    for number, (i, seen) in enumerate(zip(new, looked, strict=True), start=1):
        entries[i] = entries[i]._replace(digest=seen[0], kind=seen[1], error=seen[2])
        if number % BLOCK == 0:  # a start that is stopped need not begin again
            keep()
    if entries != list(known.values()):
        keep()
    return Index(entries, sorted(others, key=os.fsencode), hidden, kept)


def look(
    read: Callable[[int], bytes], numbers: Sequence[int], what: str
) -> Iterator[tuple[str, Kind | None, str]]:
    """(digest, kind, error) of each numbered file, by all cores; a bar shows if that is long."""

    def one(number: int) -> tuple[str, Kind | None, str]:
        try:
            content = read(number)
        except OSError as error:
            return "", None, error.strerror or str(error)
        digest = hashlib.sha256(content).hexdigest()[:32]
        try:
            return digest, examine(content), ""
        except MemoryError:
            raise
        except Exception as error:  # Pillow's readers raise whatever they meet
            return digest, None, reason(error)

    chunks = [numbers[i : i + CHUNK] for i in range(0, len(numbers), CHUNK)]
    with (
        warnings.catch_warnings(),
        ThreadPoolExecutor() as pool,
        tqdm(total=len(numbers), desc=what, unit="file", delay=3, leave=False) as bar,
    ):
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            for results in pool.map(lambda chunk: [one(number) for number in chunk], chunks):
                bar.update(len(results))
                yield from results
        finally:
            pool.shutdown(cancel_futures=True)


def content_digest(files: Mapping[str, str]) -> str:
    """One digest of names and their digests, in their order; `changes` knows it again."""
    whole = hashlib.sha256()
    for path, digest in files.items():
        whole.update(os.fsencode(path) + b"\0" + digest.encode() + b"\n")
    name = whole.hexdigest()[:32]
    if not (kept := _contents(name)).exists():
        _keep(kept, dict(files))
    return name


def changes(saved: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Which files differ between the provenance of a folder then and now, in a few lines."""
    if not saved.get("source") == now.get("source") == "folder":
        return []
    if saved.get("digest") == now.get("digest"):
        return []
    try:
        old, new = (json.loads(_contents(p["digest"]).read_text()) for p in (saved, now))
    except (OSError, ValueError):
        return [f"  (which files differ is not known: {cache_folder()} has no list of the saved)"]
    groups = {
        "added": [path for path in new if path not in old],
        "removed": [path for path in old if path not in new],
        "changed": [path for path in new if old.get(path, new[path]) != new[path]],
    }
    return [f"  files {what}: {some(paths)}" for what, paths in groups.items() if paths]


def some(paths: Sequence[str], count: int = 5) -> str:
    """The first of some paths, and how many there are."""
    more = f", … ({len(paths):,} in all)" if len(paths) > count else ""
    return ", ".join(map(shown, paths[:count])) + more


def _walk(
    folder: pathlib.Path, prefix: str = "", above: frozenset[str] = frozenset()
) -> Iterator[tuple[str, Entry | None]]:
    """Each file below a folder, an entry without its content; None for a hidden one."""
    above |= {os.path.realpath(folder)}
    for item in os.scandir(folder):
        path = prefix + item.name
        refused = Entry(path, -1, 0, "", None, "")
        try:
            if item.name.startswith("."):
                yield path, None
            elif item.is_dir():
                if os.path.realpath(item.path) in above:
                    raise OSError("a link to a folder that it lies in")
                yield from _walk(pathlib.Path(item.path), path + "/", above)
            else:
                facts = item.stat()
                if not stat.S_ISREG(facts.st_mode):
                    raise OSError("no file but a pipe, a socket or a device")
                yield path, refused._replace(size=facts.st_size, mtime_ns=facts.st_mtime_ns)
        except FileNotFoundError:
            yield path, refused._replace(error="a link to nothing")
        except OSError as error:
            yield path, refused._replace(error=error.strerror or str(error))


def _same(known: Mapping[str, Entry], entry: Entry) -> bool:
    old = known.get(entry.path)
    return old is not None and bool(old.digest) and old[:3] == entry[:3]


def _kept_entries(kept: pathlib.Path) -> dict[str, Entry]:
    """What was found the last time; nothing if that was never, or by another Pillow."""
    try:
        content = json.loads(kept.read_text())
        if content["pillow"] != PIL.__version__:
            return {}
        rows = [Entry(*row) for row in content["entries"]]
        return {row.path: row._replace(kind=row.kind and Kind(*row.kind)) for row in rows}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _contents(digest: str) -> pathlib.Path:
    return cache_folder() / "contents" / f"{digest}.json"


def _keep(path: pathlib.Path, content: Any) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(content).encode())
    except OSError as error:
        warnings.warn(
            f"what was found in the data cannot be kept in {path.parent} ({error}): the next start "
            "reads all of it again, and cannot name files that have changed",
            stacklevel=2,
        )
