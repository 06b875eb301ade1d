"""One table in three notations: nothing lost, everything escaped."""

import re

import pytest

from unispect.report.tables import latex, markdown, text

HEAD = ("method", "AUROC", "AP")
ROWS = [("a_b & c|d", ".857 ± .004", "50 %"), ("{x}~$^\\#", "–", "1")]


def test_text_is_aligned() -> None:
    head, rule, *rows = text(HEAD, ROWS).splitlines()
    assert set(rule) == {"-"}
    assert len(rule) == max(map(len, (head, *rows)))
    assert head.index("AUROC") + 5 == rows[0].index(".857") + len(".857 ± .004")


def test_markdown_has_the_same_bars_in_every_line() -> None:
    lines = markdown(HEAD, ROWS).splitlines()
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in lines} == {4}
    assert lines[1] == "| --- | ---: | ---: |"


def test_latex_has_as_many_columns_as_it_declares_and_escapes_the_rest() -> None:
    lines = latex(HEAD, ROWS).splitlines()
    assert lines[0] == r"\begin{tabular}{lrr}"
    body = [line for line in lines if line.endswith(r"\\")]
    assert len(body) == 3
    assert {len(re.findall(r"(?<!\\)&", line)) for line in body} == {2}
    joined = "".join(body)
    assert joined.count("{") - joined.count(r"\{") == joined.count("}") - joined.count(r"\}")
    assert r"a\_b \& c|d" in joined
    assert r"$\pm$" in joined
    assert r"50 \%" in joined
    assert r"\textbackslash{}\#" in joined


@pytest.mark.parametrize("notation", [text, markdown, latex])
def test_a_table_without_rows(notation: object) -> None:
    assert "method" in notation(HEAD, [])  # type: ignore[operator]
