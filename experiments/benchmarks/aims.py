"""What is aimed at on one GPU, beside what a page found."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from experiments.benchmarks.peers import MODES, OURS

Found = Mapping[str, Any]


def summary(sections: Found) -> str:
    """A table in Markdown of a page's sections; what is missing was not run.

    Example:
      >>> fit = {"sides": {"ours": {"speed_over_hand": {"median": 0.985}}}}
      >>> print(summary({"fit": fit}).splitlines()[2])
      | `fit` over the bare step | ≥ 0.97 | 0.985 |
    """
    lines = ["| figure | aim | found |", "|---|---|---|"]
    for name, aim, read in AIMS:
        try:
            found = read(sections)
        except (KeyError, IndexError, TypeError, ValueError):
            found = "not run"
        lines.append(f"| {name} | {aim} | {found} |")
    return "\n".join(lines)


def _races(sections: Found, kind: str) -> list[Found]:
    return [found["sides"] for title, found in sections.items() if title.startswith(kind)]


def _rate(sides: Found) -> str:
    row = sides[OURS]
    share = row["of_matrix_product"]
    return f"{row['flops_per_second'] / 1e12:.0f}" + (f" ({share:.0%})" if share else "")


def _compiled(sides: Found) -> str:
    """Of the faster of `torch.compile`'s modes."""
    return f"{min(sides[s]['time_over_ours']['median'] for s in MODES if s in sides):.2f}"


def _single(sections: Found) -> Found:
    return _races(sections, "sampling, batch 1,")[0]


def _fit(key: str) -> Callable[[Found], str]:
    return lambda sections: f"{sections['fit']['sides'][OURS][key]['median']:.3f}"


def _logged(sections: Found) -> str:
    row = sections["fit"]["sides"][OURS]
    mfu = row["logged"]["mfu"]
    of = row["logged"]["flops_per_second"] / row["counted"]["flops_per_second"]
    return f"{of:.4f}" + (f", MFU {mfu:.1%}" if mfu else "")


AIMS: list[tuple[str, str, Callable[[Found], str]]] = [
    ("`fit` over the bare step", "≥ 0.97", _fit("speed_over_hand")),
    ("resumed over fresh", "≥ 0.98", _fit("resumed_over_fresh")),
    ("command to first step, cold cache, s", "≤ 60",
     lambda s: f"{s['first-step']['cold']['seconds']:.0f}"),
    ("the same, warm cache, s", "≤ 25", lambda s: f"{s['first-step']['warm']['seconds']:.0f}"),
    ("forward + backward, TFLOP/s (of the matrix product)", "≥ 300",
     lambda s: _rate(_races(s, "forward + backward")[0])),
    ("sampling, TFLOP/s (of the matrix product)", "≥ 330",
     lambda s: _rate(_races(s, "sampling")[0])),
    ("time of compiled diffusers / ours", "≥ 2", lambda s: _compiled(_races(s, "sampling")[0])),
    ("sampling, batch 1, ms an image", "",
     lambda s: f"{1e3 / _single(s)[OURS]['images_per_second']:.1f}"),
    ("time of compiled diffusers / ours there", "≥ 2", lambda s: _compiled(_single(s))),
    ("FLOP/s in the log / counted by hand", "0.97 to 1.03", _logged),
]  # fmt: skip
