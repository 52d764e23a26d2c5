"""The paper's orderings, decided by numbers: ours, or its own.

A comparison a < b *holds* if b − a exceeds two standard errors of the difference, *does not hold*
if a − b does, and is *within error* otherwise; a claim of many comparisons is as good as its worst.
Errors are added as if cells were independent. Cells that share their x_T are positively correlated,
so that is cautious.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

HOLDS, WITHIN, FAILS, NOT_RUN = "holds", "within error", "does not hold", "not run"


class Claim(NamedTuple):
    """One ordering, and what became of it."""

    text: str
    verdict: str  # HOLDS, WITHIN, FAILS or NOT_RUN
    detail: str


class Value(NamedTuple):
    """A number and its standard error."""

    value: float
    se: float


def compare(text: str, pairs: Iterable[tuple[str, Value, Value]]) -> Claim:
    """The claim that a < b in all of (name, a, b)."""
    groups: dict[str, list[str]] = {HOLDS: [], WITHIN: [], FAILS: []}
    for name, a, b in pairs:
        gap, error = b.value - a.value, 2 * math.hypot(a.se, b.se)
        groups[HOLDS if gap > error else FAILS if gap < -error else WITHIN].append(name)
    total = sum(map(len, groups.values()))
    if not total:
        return Claim(text, NOT_RUN, "the cells it compares were not run")
    verdict = next(v for v in (FAILS, WITHIN, HOLDS) if groups[v])
    detail = f"{len(groups[HOLDS])} of {total} comparisons hold"
    for group in (WITHIN, FAILS):
        if groups[group]:
            more = f" and {n} more" if (n := len(groups[group]) - 4) > 0 else ""
            detail += f"; {group}: {', '.join(groups[group][:4])}{more}"
    return Claim(text, verdict, detail)


def table1(cells: Sequence[Mapping[str, Any]]) -> list[Claim]:
    """§5.1 on a table of distances: which η, which S."""
    at = {(c["eta"], c["S"]): Value(c["distance"], c["se"] or 0.0) for c in cells}
    etas = sorted({eta for eta, _ in at if eta != "hat"}, key=float)
    steps = sorted({s for _, s in at})
    ten = [s for s in steps if s == 10]
    few, many = [s for s in steps if s <= 100], [s for s in steps if s > 100]

    def name(eta: str, s: int) -> str:
        return f"{'σ̂' if eta == 'hat' else f'η={eta}'} S={s}"

    def pairs(rows: Iterable[tuple[str, str]], columns: Iterable[int]) -> list[Any]:
        rows = list(rows)
        return [
            (f"{name(a, s)} < {name(b, s)}", at[a, s], at[b, s])
            for s in columns
            for a, b in rows
            if (a, s) in at and (b, s) in at
        ]

    return [
        compare("η = 0 is the best row at S ≤ 100", pairs([("0", e) for e in etas[1:]], few)),
        compare("the distance grows with η at S ≤ 100", pairs(itertools.pairwise(etas), few)),
        compare("σ̂ is the worst row at S = 10", pairs([(e, "hat") for e in etas], ten)),
        compare("σ̂ is the best row at S = 1000", pairs([("hat", e) for e in etas], many)),
        compare(
            "the distance falls with S in every row",
            [
                (f"{name(e, t)} < S={s}", at[e, t], at[e, s])
                for e in [*etas, "hat"]
                for s, t in itertools.pairwise(steps)
                if (e, s) in at and (e, t) in at
            ],
        ),
    ]  # fmt: skip


def table2(cells: Sequence[Mapping[str, Any]]) -> list[Claim]:
    """§5.4: the error of encoding and decoding falls with S."""
    plain = {c["S"]: Value(c["error"], c["se"]) for c in cells}
    return [compare("the reconstruction error falls with S", _falling(plain, "S"))]


def table3(cells: Sequence[Mapping[str, Any]]) -> list[Claim]:
    """§5.1 on LSUN; in the paper's Church column DDPM overtakes DDIM at S = 100."""
    at = {(c["eta"], c["S"]): Value(c["distance"], c["se"] or 0.0) for c in cells}
    steps = sorted({s for _, s in at})
    return [
        compare(
            "η = 0 is better than η = 1 at S ≤ 50",
            [
                (f"S={s}", at["0", s], at["1", s])
                for s in steps
                if s <= 50 and ("0", s) in at and ("1", s) in at
            ],
        ),
        *(
            compare(
                f"the distance falls with S at η = {e}",
                _falling({s: at[e, s] for s in steps if (e, s) in at}, "S"),
            )
            for e in ("0", "1")
        ),
    ]


def fig4(cells: Mapping[str, Any]) -> list[Claim]:
    """§5.1, Figure 4: time is linear in S."""
    r2 = cells["fit"]["r_squared"]
    offset = cells["fit"]["offset"] / cells["fit"]["seconds_per_step"]
    return [
        Claim(
            "the time of sampling is linear in S (R² ≥ 0.99)",
            HOLDS if r2 >= 0.99 else FAILS,
            f"R² = {r2:.5f}; the offset is worth {offset:.2g} steps",
        )
    ]


def fig5(cells: Sequence[Mapping[str, Any]]) -> list[Claim]:
    """§5.2: with η = 0, x_T decides the image, whatever τ."""
    value = lambda c: Value(c["correlation"], c["se"])  # noqa: E731
    by = {(c["what"], c["S"]): value(c) for c in cells}
    other = next(value(c) for c in cells if c["what"] == "other x_T")
    same = [c for c in cells if c["what"].startswith("η = 0")]
    noisy = [c for c in cells if c["what"].startswith("η = 1")]
    linear = {s: v for (what, s), v in by.items() if what == "η = 0, linear"}
    rising = [(f"S={s} < S={t}", linear[s], linear[t]) for s, t in _neighbours(linear)]
    return [
        compare(
            "the same x_T gives more alike images than another x_T does, for every τ",
            [(f"{c['what']} S={c['S']}", other, value(c)) for c in same],
        ),
        compare(
            "at η = 1 the same x_T does not fix the image: η = 0 agrees more at the same S",
            [(f"S={c['S']}", value(c), by["η = 0, linear", c["S"]]) for c in noisy],
        ),
        compare("agreement with the longest τ rises with S", rising),
    ]


def fig6(cells: Mapping[str, Any]) -> list[Claim]:
    """§5.3: slerp between two x_T is a smooth path of images."""
    share, near = cells["smooth_share"], cells["nearest"]
    return [
        Claim(
            "slerp gives smooth paths: no step between neighbours is as long as the whole way",
            HOLDS if share == 1 else FAILS,
            f"{share:.0%} of {cells['paths']} paths",
        ),
        compare(
            "the middle of a path is nearer to the data than the mean of its two end images",
            [("all paths", Value(*near["middle"]), Value(*near["pixel mean"]))] if near else [],
        ),
    ]


def discrete(cells: Mapping[str, Any]) -> list[Claim]:
    """Appendix A has no figures; these are what a working sampler must show."""
    rows: dict[str, dict[int, Value]] = {}
    for c in cells["samples"]:
        rows.setdefault(c["row"], {})[c["S"]] = Value(c["distance"], c["se"])
    least = rows["η = 0, largest σ"]
    independent = Value(cells["independent"]["distance"], cells["independent"]["se"])
    bits = {c["S"]: Value(c["bits"], c["se"]) for c in cells["bounds"]}
    most = max(bits)
    return [
        compare("the distance falls with S, least stochastic σ", _falling(least, "S")),
        compare(
            "every S > 1 is better than independent pixels",
            [(f"{r} S={s}", v, independent) for r, row in rows.items() for s, v in row.items()
             if s > 1],
        ),
        compare(
            "least stochastic σ is better than ancestral sampling at the same S",
            [(f"S={s}", v, rows["η = 1, ancestral"][s]) for s, v in least.items() if s > 1],
        ),
        compare(
            f"held-out bits per pixel (η = 1, S = {most}) are below those of independent pixels",
            [(f"S={most}", bits[most], Value(cells["independent"]["bits"], 0.0))],
        ),
    ]  # fmt: skip


def solvers(cells: Sequence[Mapping[str, Any]]) -> list[Claim]:
    """§4.3 and §7: which Euler step, and what higher order buys."""
    at = {(c["method"], c["tau"], c["S"]): Value(c["rms"], c["rms_se"]) for c in cells}
    steps = sorted({s for *_, s in at})

    def beats(a: tuple[str, str], b: tuple[str, str]) -> list[tuple[str, Value, Value]]:
        both = [s for s in steps if (*a, s) in at and (*b, s) in at]
        return [(f"S={s}", at[*a, s], at[*b, s]) for s in both]

    euler, second = ("ddim", "linear"), ("adams-bashforth-2", "linear")
    third, quadratic = ("adams-bashforth-3", "quadratic"), ("ddim", "quadratic")
    chosen, in_dt = ("ddim", "optimised"), ("pf-euler", "linear")
    return [
        compare("DDIM's step errs less than Eq. 15's (linear τ)", beats(euler, in_dt)),
        compare("Adams–Bashforth 2 errs less than DDIM (linear τ)", beats(second, euler)),
        compare("Adams–Bashforth 3 errs less than DDIM (quadratic τ)", beats(third, quadratic)),
        compare("DDIM errs less with optimised τ than linear τ", beats(chosen, euler)),
    ]


CLAIMS: dict[str, Callable[[Any], list[Claim]]] = {
    f.__name__: f for f in (table1, table2, table3, fig4, fig5, fig6, discrete, solvers)
}


def _neighbours(row: Mapping[int, Any]) -> list[tuple[int, int]]:
    steps = sorted(row)
    return list(itertools.pairwise(steps))


def _falling(row: Mapping[int, Value], name: str) -> list[tuple[str, Value, Value]]:
    return [(f"{name}={t} < {name}={s}", row[t], row[s]) for s, t in _neighbours(row)]
