"""The command `ddim-jax`: train a network, draw with it, and look at runs.

Each command is one function in a file of this folder, imported when it is called for.
"""

from __future__ import annotations

import difflib
import importlib
import os
import pathlib
import signal
import sys
import threading
import warnings
from types import FrameType
from typing import NoReturn

COMMANDS = {  # name → where its function is, and the first line of its docstring
    "train": (
        "ddim_jax.cli.train:train",
        "Train a preset on all devices; every field of it can be overridden.",
    ),
    "distill": (
        "ddim_jax.cli.distill:distill",
        "Teach a model to draw in half as many steps, again and again (progressive distillation).",
    ),
    "demo": (
        "ddim_jax.cli.demo:demo",
        "Train on 8×8 digits for a few minutes, and make a page of what it draws, and in colour.",
    ),
    "data": (
        "ddim_jax.cli.data:data",
        "List data sets, look into one or a folder, or download and prepare one (with TensorFlow).",
    ),
    "sample": (
        "ddim_jax.cli.sample:sample",
        "Draw images with a trained model, and save them as one PNG, or as you say.",
    ),
    "explore": (
        "ddim_jax.cli.explore:explore",
        "Make one HTML file with sliders for S, η, the path between two x_T, and t.",
    ),
    "generate": (
        "ddim_jax.cli.generate:generate",
        "Draw many images, for evaluation, into a folder of .npy shards; called again, it goes on.",
    ),
    "evaluate": (
        "ddim_jax.cli.evaluate:evaluate",
        "Compare generated images with a data set, or give real ones' bits/dim under a model.",
    ),
    "info": (
        "ddim_jax.cli.info:info",
        "Say what a model or a run is: progress, checkpoints, configuration.",
    ),
    "average": (
        "ddim_jax.cli.average:average",
        "Write the weights of a run under a moving average of another length, as one file.",
    ),
    "export": (
        "ddim_jax.cli.export:export",
        "Write a model as a .safetensors file or a diffusers folder, or a sampler as .stablehlo.",
    ),
}
GO_ON = ("demo", "generate", "evaluate")  # commands that, called again, go on where they were
ERRORS = (ValueError, TypeError, OSError, ArithmeticError, MemoryError, ModuleNotFoundError)
PREEMPTED = 75  # sysexits' EX_TEMPFAIL: stopped by a signal and saved; run it again
EXTRAS = {  # what the modules of this package and of its extras are called
    *("ddim_jax", "absl", "array_record", "grain", "matplotlib", "optax", "orbax", "sklearn"),
    *("tensorboardX", "tensorflow_datasets"),
}
INSTALL = "training, runs and evaluation need more: in a checkout, pip install '.[train]'"


def main() -> None:
    """The console script.

    Errors of use become a message and exit code 1 (2 where the line itself is wrong); a signal 75
    where training saved its state, else 130 (Ctrl-C) or 143 (SIGTERM).
    """
    name, *words = sys.argv[1:] or [""]
    if name in ("-h", "--help"):
        print(overview())
    elif name == "--version":
        print(version())
    elif name not in COMMANDS:
        print(f"ddim-jax: error: {_unknown(name)}\n\n{overview()}", file=sys.stderr)
        sys.exit(2)
    else:
        warnings.formatwarning = _one_line  # type: ignore[assignment]
        if threading.current_thread() is threading.main_thread():
            again = "; the same command goes on from here" if name in GO_ON else ""
            _stop_on_signals(f"\nddim-jax: stopped{again}\n")
        _run(name, words)


def overview() -> str:
    """All commands, without importing any.

    Example:
      >>> print(overview())
      usage: ddim-jax COMMAND ...
      ...
    """
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {line}" for name, (_, line) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: ddim-jax COMMAND ...",
            "",
            "Train a network, draw with it, and look at runs.",
            "",
            *lines,
            "",
            "ddim-jax COMMAND --help says more; ddim-jax --version, which version this is.",
        ]
    )


def version() -> str:
    """Of this package and of JAX."""
    import jax

    from ddim_jax.version import __version__

    return f"ddim_jax {__version__}, jax {jax.__version__}"


def _stop_on_signals(said: str) -> None:
    """Ctrl-C and SIGTERM end the process at once, with one line.

    An exception could be lost where the interpreter ignores those of callbacks, and an orderly end
    waits, perhaps for minutes, for what the devices compute. Files are written whole or not at all.
    """

    def stop(number: int, frame: FrameType | None) -> NoReturn:
        os.write(2, said.encode())  # print may be what was interrupted
        os._exit(128 + number)

    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) != signal.SIG_IGN:  # as in a shell's background
            signal.signal(number, stop)


def _one_line(message: Warning | str, *_: object) -> str:
    return f"ddim-jax: warning: {message}\n"


def _unknown(name: str) -> str:
    if not name:
        return "say which command"
    close = difflib.get_close_matches(name, [*COMMANDS, "--help", "--version"], 1)
    return f"no command {name!r}" + (f"; did you mean {close[0]}?" if close else "")


def _run(name: str, words: list[str]) -> None:
    import jax
    import tyro

    from ddim_jax.training.run_folder import Preempted

    cache = pathlib.Path(os.environ.get("XDG_CACHE_HOME", pathlib.Path.home() / ".cache"))
    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        jax.config.update("jax_compilation_cache_dir", str(cache / "ddim_jax"))
    module, _, function = COMMANDS[name][0].partition(":")
    try:
        command = getattr(importlib.import_module(module), function)
        tyro.cli(
            command,
            prog=f"ddim-jax {name}",
            args=words,
            config=(tyro.conf.CascadeSubcommandArgs,),
        )
    except Preempted as stopped:
        print(f"ddim-jax: {stopped}", file=sys.stderr)
        sys.exit(PREEMPTED)
    except (*ERRORS, RuntimeError, AssertionError) as error:
        said = _said(error)
        if os.environ.get("DDIM_JAX_TRACEBACK") or said is None:
            raise
        message = f"ddim-jax: error: {said}\n(DDIM_JAX_TRACEBACK=1 shows where)"
        if (
            jax.distributed.is_initialized()
        ):  # at once: the others wait for this one, and are told so
            print(message, file=sys.stderr, flush=True)
            os._exit(1)
        sys.exit(message)


def _said(error: Exception) -> str | None:
    """What the user is told of an error; None for one that is no fault of use."""
    import jax

    if isinstance(error, ModuleNotFoundError) and (error.name or "").partition(".")[0] in EXTRAS:
        return f"{error}; {INSTALL}"
    if isinstance(error, ERRORS):
        return str(error) or type(error).__name__
    if (missing := _missing_platform()) is not None:
        return missing
    if isinstance(error, jax.errors.JaxRuntimeError):
        first = str(error).splitlines()[0]
        full = "RESOURCE_EXHAUSTED" in first
        return f"{first}; try a smaller batch, or more devices" if full else first
    return None


def _missing_platform() -> str | None:
    """Says so where $JAX_PLATFORMS asks for what is not there; JAX raises various errors then."""
    import jax

    try:
        jax.devices()
        return None
    except (RuntimeError, AssertionError):
        jax.config.update("jax_platforms", "")
    wanted = os.environ.get("JAX_PLATFORMS")
    return (
        f"JAX_PLATFORMS={wanted} asks for a platform that is not there; there is "
        f"{jax.default_backend()}. Unset JAX_PLATFORMS to take it; a GPU needs pip install "
        "'jax[cuda12]', a TPU 'jax[tpu]'"
    )
