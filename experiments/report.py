"""One page with every result beside the paper's figures.

    python -m experiments.report results/ [--out results/report.html]

Reads each `result.json` in the folder and below it. What was not run is said to be not run.
"""

from __future__ import annotations

import argparse
import html
import pathlib
from collections.abc import Sequence
from typing import Any

from ddim_jax.pictures import plots
from experiments import paper_numbers as paper
from experiments.arguments import run
from experiments.claims import CLAIMS, NOT_RUN, Claim
from experiments.provenance import read_json, write
from experiments.report_tables import PAPER, TABLES, Rows

TITLE = "The tables and figures of DDIM, reproduced"
SECTIONS = {
    "table1": "Table 1: distance for every η and S",
    "table2": "Table 2: encode, then decode",
    "table3": "Table 3: LSUN at 256×256",
    "fig3": "Figure 3: samples",
    "fig4": "Figure 4: time against S",
    "fig5": "Figure 5: one x_T, several τ",
    "fig6": "Figure 6: interpolation",
    "discrete": "Appendix A: categories",
    "solvers": "Solvers: quality against network calls",
    "objectives": "Objectives: what to predict, and how to weigh it",
    "distillation": "Distillation: students beside the solvers at the same calls",
}


def main(argv: Sequence[str] | None = None) -> pathlib.Path:
    """Writes the page, and returns its path."""
    parser = argparse.ArgumentParser(prog="python -m experiments.report", description=__doc__)
    parser.add_argument("results", type=pathlib.Path)
    parser.add_argument("--out", type=pathlib.Path, help="by default RESULTS/report.html")
    args = parser.parse_args(argv)
    out = args.out or args.results / "report.html"
    if not args.results.is_dir():
        raise FileNotFoundError(f"no folder {args.results}")
    if out.exists() and f"<title>{TITLE}</title>" not in out.read_text(errors="replace"):
        raise FileExistsError(f"{out} is no report; choose another --out")
    results = read(args.results)
    write(out, page(results).encode())
    print(f"wrote {out}: {len(results)} results")
    return out


def read(folder: pathlib.Path) -> list[dict[str, Any]]:
    """All results below a folder, each with the folder's name and its picture."""
    found = []
    for path in sorted(folder.rglob("result.json")):
        result = read_json(path)
        if result.get("experiment") not in SECTIONS:
            raise ValueError(f"{path} is no result of these experiments")
        picture = path.parent / "figure.png"
        result["folder"] = str(path.parent.relative_to(folder))
        result["png"] = picture.read_bytes() if picture.exists() else None
        found.append(result)
    return found


def page(results: Sequence[dict[str, Any]]) -> str:
    """The page's text."""
    body = [
        "<p>Our figures are from the models named with them. Only figures called FID can be "
        "compared with the paper's in size: FD-pixels and FD-ResNet56 are Fréchet distances in "
        "other features, on other data, with fewer samples. What can be compared is the order of "
        "rows and columns. A comparison <b>holds</b> if it exceeds two standard errors, and is "
        "<b>within error</b> if neither it nor its opposite does.</p>",
        "<h2>Which of the orderings hold</h2>",
        plots.table_html(["claim", "where", "verdict", "detail"], _all_claims(results), True),
    ]
    for name, title in SECTIONS.items():
        body.append(f"<h2>{html.escape(title)}</h2>")
        mine = [r for r in results if r["experiment"] == name]
        for result in mine or [{"experiment": name, "status": NOT_RUN, "reason": "no result here"}]:
            body += _section(result)
        if name in PAPER:
            body += ["<h3>The paper</h3>", *PAPER[name]()]
    return plots.page(TITLE, body)


def _section(result: dict[str, Any]) -> list[str]:
    if result["status"] == NOT_RUN:
        return [f"<p><b>Not run</b>: {html.escape(result['reason'])}.</p>"]
    model = result.get("model")
    source = f"model {model['source']}, " if model else ""
    device, versions = result["device"], result["versions"]
    where = (
        f"{source}seed {result['settings']['seed']}; {device['count']} × {device['kind']} "
        f"({device['cpu']}, {device['cores']} cores), jax {versions['jax']}, ddim_jax "
        f"{versions['ddim_jax']}, Python {versions['python']}; cells {_seconds(result):,.0f} s, "
        f"finished {result['finished']}"
    )
    return [
        f"<h3>{html.escape(result['folder'])}</h3>",
        *TABLES.get(result["experiment"], lambda _: [])(result),
        *([f"<p><b>Not run</b>: {' '.join(gone)}.</p>"] if (gone := result.get("missing")) else []),
        plots.figure_html(result["png"], result["caption"]) if result["png"] else "",
        f'<p class="note">{html.escape(where)}<br>'
        f"<code>{html.escape(result['command'])}</code></p>",
    ]


def _seconds(value: Any) -> float:
    """The sum of every cell's seconds."""
    if isinstance(value, dict):
        own = value.get("seconds", 0.0) if "device" in value else 0.0
        return own + sum(_seconds(v) for v in value.values())
    return sum(map(_seconds, value)) if isinstance(value, list) else 0.0


def _all_claims(results: Sequence[dict[str, Any]]) -> Rows:
    rows = []
    for name, claims in CLAIMS.items():
        judged = [("the paper", claims(cells)) for cells in _papers_cells(name)]
        if len(judged) > 1:
            labels = list(paper.TABLE1 if name == "table1" else paper.TABLE3)
            judged = [(f"the paper, {label}", c) for label, (_, c) in zip(labels, judged)]
        ours = [r for r in results if r["experiment"] == name and r["status"] != NOT_RUN]
        judged = [(r["folder"], claims(r["cells"])) for r in ours] + judged
        if not ours:
            rows.append([SECTIONS[name], "ours", NOT_RUN, ""])
        for i in range(max((len(c) for _, c in judged), default=0)):
            rows += [_claim_row(c[i], where) for where, c in judged]
    return rows


def _claim_row(claim: Claim, where: str) -> list[str]:
    return [claim.text, where, claim.verdict, claim.detail]


def _papers_cells(name: str) -> list[Any]:
    if name == "table1":
        return [paper.as_cells(t, paper.TABLE1_STEPS) for t in paper.TABLE1.values()]
    if name == "table3":
        return [paper.as_cells(t, paper.TABLE3_STEPS) for t in paper.TABLE3.values()]
    if name == "table2":
        return [[{"S": s, "error": e, "se": 0.0} for s, e in paper.TABLE2.items()]]
    return []


if __name__ == "__main__":
    run(main)
