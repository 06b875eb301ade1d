"""One table of text cells as aligned text, Markdown or LaTeX."""

from __future__ import annotations

from collections.abc import Sequence

Cells = Sequence[str]
ESCAPES = {
    "\\": r"\textbackslash{}",
    "&": r"\&",
    "%": r"\%",
    "$": r"\$",
    "#": r"\#",
    "_": r"\_",
    "{": r"\{",
    "}": r"\}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "±": r"$\pm$",
    "–": "--",
}


def text(head: Cells, rows: Sequence[Cells], words: int = 1) -> str:
    """Columns of equal width under a rule; the first `words` to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    lines = [_line(row, widths, words) for row in (head, *rows)]
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])


def markdown(head: Cells, rows: Sequence[Cells], words: int = 1) -> str:
    """A pipe table; bars in cells are escaped."""
    marks = ["---" if column < words else "---:" for column in range(len(head))]
    lines = [head, marks, *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def latex(head: Cells, rows: Sequence[Cells], words: int = 1) -> str:
    """A tabular for the package booktabs."""
    columns = "l" * words + "r" * (len(head) - words)
    body = [" & ".join(map(_escaped, row)) + r" \\" for row in (head, *rows)]
    lines = [r"\toprule", body[0], r"\midrule", *body[1:], r"\bottomrule"]
    return "\n".join([rf"\begin{{tabular}}{{{columns}}}", *lines, r"\end{tabular}"])


def _line(row: Cells, widths: Sequence[int], words: int) -> str:
    cells = [
        cell.ljust(width) if column < words else cell.rjust(width)
        for column, (cell, width) in enumerate(zip(row, widths, strict=True))
    ]
    return "  ".join(cells).rstrip()


def _escaped(cell: str) -> str:
    return "".join(ESCAPES.get(letter, letter) for letter in cell)
