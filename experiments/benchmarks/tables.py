"""What a race found, as figures and as a table in Markdown."""

from __future__ import annotations

import hashlib
import statistics
from collections.abc import Mapping
from typing import Any

import numpy as np

from experiments.benchmarks import peers, sampling, train_loop, training
from experiments.benchmarks.peers import OURS
from experiments.benchmarks.racing import Race


def slug(text: str) -> str:
    """A name for a folder, none of no text.

    Example:
      >>> slug(""), len(slug("--xla_gpu_autotune_level=0"))
      ('', 8)
    """
    return hashlib.sha256(text.encode()).hexdigest()[:8] if text else ""


def of_race(
    race: Race, found: Mapping[str, Any], page: Mapping[str, Any], work: float
) -> dict[str, Any]:
    """Figures of each side, and the table as "text".

    Args:
      race: which.
      found: from `Course.run`.
      page: all that is known; its "machine" is told what the sides say of it, and its limits.
      work: FLOP of one image and call of the network.
    """
    spec, sides, machine = race.specs[0], found["sides"], page["machine"]
    if OURS in sides:
        machine |= sides[OURS]["facts"]
    absent = dict(found["not run"])
    if spec.get("figures"):
        figures = {side: row["answers"][0]["figures"] for side, row in sides.items()}
        if spec["what"] == "limits":
            machine["limits"] = figures
            text = _limits(figures, machine)
        else:
            text = train_loop.show(figures[OURS]) if OURS in figures else race.title
        return {"text": "\n".join([text, *_not_run(absent)]), "sides": figures, "not run": absent}
    passes = spec["steps"] or training.WORK[spec["what"]]
    flops = passes * spec["batch"] * work
    rows = {side: _row(side, row, sides, spec, flops, machine) for side, row in sides.items()}
    times = {side: [a["seconds"] for a in row["answers"]] for side, row in sides.items()}
    text = "\n".join([*_table(race.title, rows), *_not_run(absent)])
    return {"text": text, "sides": rows, "seconds": times, "not run": absent}


def _row(side: str, row: Mapping[str, Any], sides: Mapping[str, Any], spec: Mapping[str, Any],
         flops: float, machine: Mapping[str, Any]) -> dict[str, Any]:  # fmt: skip
    times = [a["seconds"] for a in row["answers"]]
    middle = statistics.median(times)
    own = OURS if peers.is_ours(side) else peers.EAGER
    limit = machine.get("limits", {}).get(own, {}).get("flops_per_second")
    made = {
        "seconds": peers.spread(times),
        "images_per_second": spec["batch"] / middle,
        "flops_per_second": flops / middle,
        "of_matrix_product": limit and flops / middle / limit,
        **{k: row[k] for k in ("prepare_seconds", "first_seconds", "memory_mb") if k in row},
    }
    if OURS in sides:
        ours = [a["seconds"] for a in sides[OURS]["answers"]]
        made["time_over_ours"] = peers.spread([a / b for a, b in zip(times, ours)])
        if spec["what"] in ("sampling", training.FORWARD):
            first, own = (np.load(s["output"]) for s in (sides[OURS], row))
            made["disagreement"] = sampling.disagreement(first, own)
    return made


def _table(title: str, rows: Mapping[str, Any]) -> list[str]:
    lines = [
        f"| {title} | ms | ms an image | images/s | TFLOP/s | of the product | time / ours | "
        "ready, s | MB | differs |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for side, row in rows.items():
        time, ratio, limit = row["seconds"], row.get("time_over_ours"), row["of_matrix_product"]
        cells = [
            side if side.startswith("torch") or not side.startswith(f"{OURS},") else f"`{side}`",
            f"{1e3 * time['median']:.2f} ({1e3 * time['least']:.2f} to {1e3 * time['most']:.2f})",
            f"{1e3 / row['images_per_second']:.4g}",
            f"{row['images_per_second']:.4g}",
            f"{row['flops_per_second'] / 1e12:.4g}",
            f"{limit:.0%}" if limit else "",
            f"{ratio['median']:.2f} ({ratio['least']:.2f} to {ratio['most']:.2f})" if ratio else "",
            f"{row['prepare_seconds']:.1f}",
            " / ".join(f"{v:.0f}" for v in row.get("memory_mb", {}).values()),
            f"{row['disagreement']:.1e}" if "disagreement" in row else "",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _not_run(absent: Mapping[str, str]) -> list[str]:
    return [f"\n{side}: not run: {why}" for side, why in absent.items()]


def _limits(figures: Mapping[str, Any], machine: Mapping[str, Any]) -> str:
    names = {OURS: "JAX", peers.EAGER: "PyTorch"}
    lines = [f"| {machine.get('kind', 'this machine')} | matrix product, TFLOP/s | memory, GB/s |",
             "|---|---|---|"]  # fmt: skip
    for side, row in figures.items():
        rate, moved = row["flops_per_second"] / 1e12, row["bytes_per_second"] / 1e9
        lines.append(f"| {names[side]} | {rate:.4g} | {moved:.4g} |")
    return "\n".join(lines)


def starts(title: str, found: Mapping[str, Mapping[str, Any]]) -> str:
    """Of `starting`: a row for each."""
    lines = [f"| {title} | s | of which |", "|---|---|---|"]
    for name, row in found.items():
        if "why" in row:
            lines.append(f"| {name} | not run: {row['why']} | |")
        elif "first_seconds" in row:
            lines.append(f"| {name} | {row['first_seconds']:.1f} | reading the weights, compiling "
                         f"and drawing {row['prepare_seconds']:.1f} |")  # fmt: skip
        else:
            said = row["compiling"]
            part = "" if said is None else f"compiling, as it says, {said:.0f}"
            lines.append(f"| {name} cache | {row['seconds']:.1f} | {part} |")
    return "\n".join(lines)
