"""The tables of each experiment's result, and beside them the paper's, as HTML."""

from __future__ import annotations

import html
from collections.abc import Callable, Sequence
from typing import Any

from ddim_jax.pictures import plots
from experiments import paper_numbers as paper
from experiments.arguments import row_label
from experiments.claims import NOT_RUN

Rows = list[list[str]]


def _pm(value: float | None, se: float | None = None, digits: int = 3) -> str:
    if value is None:
        return "–"
    return f"{value:.{digits}g}" + (f" ± {se:.1g}" if se else "")


def _grid(cells: Sequence[dict[str, Any]], row: str, label: Callable[[str], str],
          show: Callable[[dict[str, Any]], str]) -> tuple[list[int], Rows]:  # fmt: skip
    """Cells of (row, S) as rows of text."""
    steps = sorted({c["S"] for c in cells})
    at = {(c[row], c["S"]): show(c) for c in cells}
    names = list(dict.fromkeys(c[row] for c in cells))
    return steps, [[label(n), *(at.get((n, s), NOT_RUN) for s in steps)] for n in names]


def _distance_rows(result: dict[str, Any], steps: list[int], counts: dict[int, int]) -> Rows:
    """The floor and the number of samples, under a table of distances."""
    floors = {f["num_images"]: _pm(f["distance"], f["se"]) for f in result["floors"]}
    nearest = [min(floors, key=lambda n: abs(n - counts[s])) for s in steps]
    return [
        ["real images", *(f"{floors[n]} (n = {n:,})" for n in nearest)],
        ["samples n", *(f"{counts[s]:,}" for s in steps)],
    ]


def _table1(result: dict[str, Any]) -> list[str]:
    cells = result["cells"]
    steps, rows = _grid(cells, "eta", row_label, lambda c: _pm(c["distance"], c["se"]))
    rows += _distance_rows(result, steps, {c["S"]: c["num_images"] for c in cells})
    header = [f"S = {s}" for s in steps]
    tables = [plots.table_html([result["name"], *header], rows)]
    for key, se in (("kernel", "kernel_se"), ("precision", ""), ("recall", "")):
        if key in cells[0]:
            _, rows = _grid(cells, "eta", row_label, lambda c, k=key, e=se: _pm(c[k], c.get(e)))
            tables.append(plots.table_html([cells[0].get(f"{key}_name", key), *header], rows))
    return tables


def _table2(result: dict[str, Any]) -> list[str]:
    exact = {c["S"]: c for c in result["exact"]}
    header = ["S", "plain, ε at the target", "plain, ε at the source", "images",
              "the paper, CIFAR-10"]  # fmt: skip
    header += ["exact inverse", "converged", "its error", "images"]
    rows = []
    for c in result["cells"]:
        line = [str(c["S"]), _pm(c["error"], c["se"]), _pm(c["source_error"], c["source_se"]),
                f"{c['num_images']:,}", _pm(paper.TABLE2.get(c["S"]))]  # fmt: skip
        e = exact.get(c["S"])
        rows.append(line + (
            [_pm(e["error"], e["se"]), f"{e['converged']:.0%}", _pm(e["converged_error"]),
             f"{e['num_images']:,}"] if e else [NOT_RUN, "", "", ""]
        ))  # fmt: skip
    note = '<p class="note">“Its error” is that of the converged images alone.</p>'
    return [plots.table_html(header, rows), note, *map(_reach, result.get("reach", []))]


def _reach(cell: dict[str, Any]) -> str:
    """Which step errs: the error where encoding ends at each t."""
    head = f"S = {cell['S']}: encoded no farther than t ({cell['num_images']:,} images)"
    rows = [
        [f"ε at the {where}", *map(_pm, cell[where], cell[f"{where}_se"])]
        for where in ("target", "source")
    ]
    return plots.table_html([head, *map(str, cell["t"])], rows)


def _fig4(result: dict[str, Any]) -> list[str]:
    fit, times = result["cells"]["fit"], result["cells"]["times"]
    rows = [
        [str(c["S"]), f"{c['shortest']:.4g}", f"{c['median']:.4g}",
         f"{fit['offset'] + fit['seconds_per_step'] * c['S']:.4g}"] for c in times
    ]  # fmt: skip
    return [plots.table_html(["S", "shortest, s", "median, s", "line, s"], rows)]


def _fig5(result: dict[str, Any]) -> list[str]:
    rows = [
        [c["what"], str(c["S"]), _pm(c["correlation"], c["se"]), _pm(c["mse"], c["mse_se"]),
         str(c["num_images"])] for c in result["cells"]
    ]  # fmt: skip
    header = ["τ", "S", "correlation", "mean squared error, pixels in [0, 1]", "images"]
    return [plots.table_html(header, rows)]


def _fig6(result: dict[str, Any]) -> list[str]:
    c = result["cells"]
    rows = [
        ["one step between neighbours, mean", _pm(c["rms_step"])],
        ["longest step of a path, mean", _pm(c["rms_largest_step"])],
        ["end to end, mean", _pm(c["rms_end_to_end"])],
        *([f"nearest image of the data: {k}", _pm(*v)] for k, v in c["nearest"].items()),
    ]
    return [plots.table_html([f"RMS over pixels in [−1, 1], {c['paths']} paths", ""], rows)]


def _discrete(result: dict[str, Any]) -> list[str]:
    c = result["cells"]
    steps, rows = _grid(c["samples"], "row", str, lambda v: _pm(v["distance"], v["se"]))
    counts = {v["S"]: v["num_images"] for v in c["samples"]}
    independent = c["independent"]
    rows.append(
        ["independent pixels", *[_pm(independent["distance"], independent["se"])] * len(steps)]
    )
    rows += _distance_rows(result, steps, counts)
    bounds = {v["S"]: v for v in c["bounds"]}
    for eta, bits, se in ((1, "bits", "se"), (0, "least_bits", "least_se")):
        row = [_pm(bounds[s][bits], bounds[s][se]) for s in steps]
        rows.append([f"bound, bits per held-out pixel, η = {eta}", *row])
    rows.append(["the same of independent pixels", *[_pm(independent["bits"])] * len(steps)])
    return [plots.table_html([result["name"], *(f"S = {s}" for s in steps)], rows)]


def _solvers(result: dict[str, Any]) -> list[str]:
    cells = [{**c, "row": f"{c['method']}, {c['tau']}"} for c in result["cells"]]
    steps, rms = _grid(cells, "row", str, lambda c: _pm(c["rms"], c["rms_se"]))
    header = [f"S = {s}" for s in steps]
    best = [[str(c["S"]), c["method"], c["tau"], _pm(c["rms"], c["rms_se"])]
            for c in result["best"]]  # fmt: skip
    tables = [
        plots.table_html(["S", "least RMS error", "τ", ""], best),
        plots.table_html(["RMS error to the ODE", *header], rms),
    ]
    if "floors" in result:
        _, distance = _grid(cells, "row", str, lambda c: _pm(c["distance"], c["se"]))
        distance += _distance_rows(result, steps, {c["S"]: c["num_images"] for c in cells})
        tables.append(plots.table_html([result["name"], *header], distance))
    return tables


def _objectives(result: dict[str, Any]) -> list[str]:
    cells = [
        {**row, "run": f"{row['objective']}, {row['recipe']}, {row['updates']:,} updates"}
        for row in result["rows"]
    ]
    steps, rows = _grid(cells, "run", str, lambda c: _pm(c["distance"], c["se"]))
    counts = {int(s): n for c in result["cells"] for s, n in c["num_images"].items()}
    rows += _distance_rows(result, steps, counts)
    seeds = ", ".join(map(str, result["settings"]["seeds"]))
    note = f'<p class="note">Means over seeds {seeds}, with their standard errors.</p>'
    return [plots.table_html([result["name"], *(f"S = {s}" for s in steps)], rows), note]


def _distillation(result: dict[str, Any]) -> list[str]:
    steps, rows = _grid(result["rows"], "way", str, lambda c: _pm(c["distance"], c["se"]))
    cell = result["cells"][0]
    seeds = ", ".join(map(str, result["settings"]["seeds"]))
    note = (
        f'<p class="note">{cell["num_images"]:,} samples at η = 0, ladders of seeds {seeds}; real '
        f"half against half: {_pm(result['floors'][0]['distance'], result['floors'][0]['se'])}.</p>"
    )
    return [plots.table_html([cell["name"], *(f"S = {s}" for s in steps)], rows), note]


def _papers_table(table: dict[str, Any], steps: Sequence[int]) -> list[str]:
    header = [f"S = {s}" for s in steps]
    return [
        plots.table_html([f"FID, {data}", *header], [
            [row_label(eta), *(f"{v:g}" for v in row)] for eta, row in rows.items()
        ])
        for data, rows in table.items()
    ]  # fmt: skip


def _text(text: str) -> Callable[[], list[str]]:
    return lambda: [f"<p>{html.escape(text)}</p>"]


TABLES: dict[str, Callable[[dict[str, Any]], list[str]]] = {
    "table1": _table1, "table2": _table2, "table3": _table1, "fig4": _fig4, "fig5": _fig5,
    "fig6": _fig6, "discrete": _discrete, "solvers": _solvers, "objectives": _objectives,
    "distillation": _distillation,
}  # fmt: skip
PAPER: dict[str, Callable[[], list[str]]] = {
    "table1": lambda: _papers_table(paper.TABLE1, paper.TABLE1_STEPS),
    "table2": lambda: [plots.table_html(
        ["S", *map(str, paper.TABLE2)],
        [["CIFAR-10 test set", *(f"{v:g}" for v in paper.TABLE2.values())]],
    )],
    "table3": lambda: _papers_table(paper.TABLE3, paper.TABLE3_STEPS),
    "fig4": _text("Time to draw 50,000 images is linear in S (Figure 4, no numbers printed)."),
    "fig5": _text("Images from one x_T agree in their high-level features whatever τ (§5.2)."),
    "fig6": _text("Slerp between two x_T gives smooth paths of meaningful images (§5.3)."),
    "discrete": _text("Appendix A defines the discrete case and reports no figures."),
    "solvers": _text(
        "Eq. 15 is expected to differ from DDIM for few steps (§4.3); multistep methods are future "
        "work (§7). No figures are reported."
    ),
    "objectives": _text("All of the paper's networks predict ε, with γ = 1 (Eq. 5)."),
}  # fmt: skip
