"""The report's tables in Markdown, for the pages of the documentation.

python -m experiments.markdown results/
"""

from __future__ import annotations

import argparse
import html
import pathlib
import re
from collections.abc import Sequence

from experiments import report
from experiments.arguments import run


def main(argv: Sequence[str] | None = None) -> str:
    """Prints them, each under its folder."""
    parser = argparse.ArgumentParser(prog="python -m experiments.markdown", description=__doc__)
    parser.add_argument("results", type=pathlib.Path)
    args = parser.parse_args(argv)
    if not args.results.is_dir():
        raise FileNotFoundError(f"no folder {args.results}")
    text = tables(report.page(report.read(args.results)))
    print(text)
    return text


def tables(page: str) -> str:
    """Headings and tables of a page.

    Example:
      >>> print(
      ...     tables(
      ...         "<h3>a</h3><table><tr><th>x</th><th>y</th></tr>"
      ...         "<tr><td>1</td><td>2 &lt; 3</td></tr></table>"
      ...     )
      ... )
      ### a
      <BLANKLINE>
      | x | y |
      |---|---|
      | 1 | 2 < 3 |
    """
    found = re.finditer(r"<h(?P<level>[23])>(?P<head>.*?)</h|<table(?P<body>.*?)</table>", page,
                        re.DOTALL)  # fmt: skip
    return "\n\n".join(
        _table(m["body"]) if m["body"] else f"{'#' * int(m['level'])} {html.unescape(m['head'])}"
        for m in found
    )


def _table(body: str) -> str:
    rows = [
        [html.unescape(re.sub(r"<[^>]*>", "", cell))
         for cell in re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row, re.DOTALL)]
        for row in re.findall(r"<tr[^>]*>(.*?)</tr>", body, re.DOTALL)
    ]  # fmt: skip
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


if __name__ == "__main__":
    run(main)
