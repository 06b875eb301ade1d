"""Settings go through signatures and come back the same; every mistake is named with its section and key."""

import tomllib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import pytest

from unispect.config import assignment, construct, merge, read_toml, settings, write_toml
from unispect.errors import CalibrationError, ConfigError, DataError


@dataclass(frozen=True)
class Plain:
    blocks: int = 8
    rate: float = 0.01
    name: str = "hgad"
    fused: bool = True
    sizes: tuple[int, ...] = (256, 512)
    box: tuple[int, float] = (1, 2.0)
    tags: Sequence[str] = ()
    kept: list[str] | None = None
    scoring: Literal["predicted", "marginal"] = "predicted"
    folder: Path = Path("cache")
    seed: int | None = None
    either: int | str = 1
    clip: float | None = None


class Later:
    """Annotations as texts, one known to a type checker alone, and a required argument."""

    def __init__(self, channels: "list[int]", width: "float" = 1.0, *, hidden: "OnlyForTheChecker" = 3):  # noqa: F821
        if width < 0:
            raise ValueError(f"width={width}: expected at least 0")
        self.channels, self.width, self.hidden = channels, width, hidden


def table_of(value: Any) -> dict[str, Any]:
    return tomllib.loads(write_toml(value))


CHANGED = {
    "blocks": 4, "rate": 1, "name": "x", "fused": False, "sizes": [1, 2, 3], "box": [7, 3], "tags": ["a", "b"],
    "kept": ["c"], "scoring": "marginal", "folder": "d/e", "seed": 0, "either": "two", "clip": 2,
}  # fmt: skip


def test_every_kind_of_value_arrives_as_annotated() -> None:
    built = construct(Plain, CHANGED, "plain")
    assert built == Plain(4, 1.0, "x", False, (1, 2, 3), (7, 3.0), ("a", "b"), ["c"], "marginal", Path("d/e"), 0, "two", 2.0)
    assert [type(built.rate), type(built.box[1]), type(built.clip)] == [float] * 3


@pytest.mark.parametrize("table", [{}, CHANGED, *({name: value} for name, value in CHANGED.items())])
def test_settings_are_complete_and_build_the_same_through_toml(table: dict[str, Any]) -> None:
    complete = settings(Plain, table)
    assert list(complete) == list(asdict(Plain()))
    assert construct(Plain, table_of(complete), "plain") == construct(Plain, table, "plain")
    assert settings(Plain, complete) == complete


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("blocks", "eight", "a whole number, got str"),
        ("blocks", 8.0, "a whole number, got float"),
        ("blocks", True, "a whole number, got bool"),
        ("rate", "0.01", "a number, got str"),
        ("rate", True, "a number, got bool"),
        ("name", 3, "text, got int"),
        ("fused", 1, "true or false, got int"),
        ("fused", "True", "true or false, got str"),
        ("sizes", 256, r"a list \[a whole number, ...\], got int"),
        ("sizes", ["a"], r"a list \[a whole number, ...\], got list"),
        ("sizes", "256", r"a list \[a whole number, ...\], got str"),
        ("box", [1], r"a list \[a whole number, a number\], got list"),
        ("tags", "abc", r"a list \[text\], got str"),
        ("kept", [1], r"a list \[text\], got list"),
        ("scoring", "oracle", "one of 'predicted', 'marginal', got str"),
        ("folder", 3, "a path, got int"),
        ("seed", "x", "a whole number, got str"),
        ("seed", False, "a whole number, got bool"),
        ("either", 2.5, "a whole number or text, got float"),
        ("blocks", {"a": 1}, "a whole number, got dict"),
        ("blocks", None, "a whole number, got NoneType"),
    ],
)
def test_a_wrong_type_names_the_key_the_value_and_what_is_expected(name: str, value: Any, expected: str) -> None:
    for check in (construct, lambda factory, table, where: settings(factory, table, where=where)):
        with pytest.raises(ConfigError, match=rf"^hgad\.{name}=.*: expected {expected}$") as caught:
            check(Plain, {name: value}, "hgad")
        assert repr(value) in str(caught.value)


def test_true_is_not_the_literal_one() -> None:
    def choose(level: Literal[1, 2]) -> int:
        return level

    assert construct(choose, {"level": 1}, "x") == 1
    with pytest.raises(ConfigError, match="expected one of 1, 2, got bool"):
        construct(choose, {"level": True}, "x")


def test_an_unknown_name_gets_the_nearest_known_one() -> None:
    with pytest.raises(ConfigError, match=r"^\[hgad\] unknown setting 'blcks': did you mean 'blocks'\? known: blocks, "):
        construct(Plain, {"blcks": 4}, "hgad")


def test_provided_arguments_are_passed_on_and_cannot_be_set() -> None:
    built = construct(Later, {"width": 2}, "later", channels=[3, 4])
    assert (built.channels, built.width, built.hidden) == ([3, 4], 2.0, 3)
    with pytest.raises(ConfigError, match=r"\[later\] unknown setting 'channels': .*known: hidden, width"):
        construct(Later, {"channels": [1]}, "later", channels=[3, 4])
    assert settings(Later, {}, skip=["channels"]) == {"width": 1.0, "hidden": 3}


def test_a_missing_argument_is_named() -> None:
    for check in (lambda: construct(Later, {}, "later"), lambda: settings(Later, {}, where="later")):
        with pytest.raises(ConfigError, match=r"^\[later\] channels missing"):
            check()


def test_a_value_that_the_factory_refuses_names_the_section() -> None:
    with pytest.raises(ConfigError, match=r"^\[later\] width=-1.0: expected at least 0$") as caught:
        construct(Later, {"channels": [], "width": -1}, "later")
    assert isinstance(caught.value.__cause__, ValueError)


@pytest.mark.parametrize("kind", [DataError, CalibrationError])
def test_errors_of_data_are_not_blamed_on_a_setting(kind: type[Exception]) -> None:
    def refuse() -> None:
        raise kind("no images")

    with pytest.raises(kind, match=r"^no images$"):
        construct(refuse, {}, "data")


def test_functions_and_methods_are_factories_too() -> None:
    class Group:
        def made(self, width: float, *, times: int = 2) -> float:
            return width * times

    assert construct(Group().made, {"width": 2}, "x", times=3) == 6.0
    assert settings(Group().made, {"width": 2}) == {"width": 2.0, "times": 2}


def test_the_table_that_is_given_is_not_changed() -> None:
    table: dict[str, Any] = {"sizes": [1, 2]}
    construct(Plain, table, "plain")
    settings(Plain, table)["sizes"].append(3)
    assert table == {"sizes": [1, 2]}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("8", 8), ("-1", -1), ("1e-3", 1e-3), ("true", True), ("True", "True"), ('"8"', "8"), ("[1, 2]", [1, 2]),
        ('["a"]', ["a"]), ("marginal", "marginal"), ("a=b", "a=b"), ("[1, 2", "[1, 2"), ("", ""), (" 8 ", 8),
        ("/data/x y", "/data/x y"), ("{a = 1}", {"a": 1}), ("2024-01-31", "2024-01-31"), ("07:32:00", "07:32:00"),
        ("1\nother = 2", "1\nother = 2"), ("tf_b6.ns", "tf_b6.ns"), ("ä", "ä"),
    ],
)  # fmt: skip
def test_assignment_reads_toml_or_takes_the_text(text: str, value: Any) -> None:
    assert assignment(f"hgad.part.blocks={text}") == {"hgad": {"part": {"blocks": value}}}
    assert assignment(f" seed = {text}") == {"seed": value}


@pytest.mark.parametrize("text", ["hgad.blocks", "", "=8", "hgad.=8", ".blocks=8", "a..b=8", "  =1"])
def test_assignment_without_a_name_or_an_equals_sign_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"expected section.name=value, such as hgad.blocks=8"):
        assignment(text)


def test_merge_goes_deep_and_leaves_both_alone() -> None:
    base = {"a": {"b": {"c": 1, "d": 2}}, "e": [1], "f": {"g": 1}, "h": 1}
    override = {"a": {"b": {"c": 9}}, "e": [2, 3], "f": 5, "h": {"i": 1}, "new": {"x": 1}}
    merged = merge(base, override)
    assert merged == {"a": {"b": {"c": 9, "d": 2}}, "e": [2, 3], "f": 5, "h": {"i": 1}, "new": {"x": 1}}
    merged["a"]["b"]["d"] = merged["new"]["x"] = 7
    merged["e"].append(4)
    assert (base["a"], override["new"], override["e"]) == ({"b": {"c": 1, "d": 2}}, {"x": 1}, [2, 3])


def test_merge_with_nothing_is_the_same_and_later_wins() -> None:
    table, first, second = {"a": {"b": 1}}, {"a": {"c": 2}}, {"a": {"b": 3}}
    assert merge(table, {}) == merge({}, table) == merge(table, table) == table
    assert merge(merge(table, first), second) == merge(table, merge(first, second))


def test_toml_leaves_none_out_and_keeps_the_rest(tmp_path: Path) -> None:
    table = {
        "seed": None,
        "a": {"x": None, "rate": 0.1, "sizes": (1, 2), "name": 'q"\n'},
        "rows": [{"y": None, "z": 1}],
    }
    (tmp_path / "c.toml").write_text(write_toml(table), encoding="utf-8")
    assert read_toml(tmp_path / "c.toml") == {
        "a": {"rate": 0.1, "sizes": [1, 2], "name": 'q"\n'},
        "rows": [{"z": 1}],
    }


def test_a_file_that_is_no_toml_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none.toml cannot be read: No such file"):
        read_toml(tmp_path / "none.toml")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_toml(tmp_path)
    for content in (b"a = ", b"\xff\xfe", b"a = 1\na = 2"):
        (tmp_path / "bad.toml").write_bytes(content)
        with pytest.raises(ConfigError, match=r"bad.toml is not TOML: "):
            read_toml(tmp_path / "bad.toml")
