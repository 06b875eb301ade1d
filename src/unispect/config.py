"""Settings: TOML <-> objects, through the signatures of their constructors.

A setting is a named constructor argument. Its type and default live in the signature and nowhere else: `construct`
checks a table against it, `settings` completes a table from it.
"""

from __future__ import annotations

import datetime
import inspect
import tomllib
from collections.abc import Callable, Collection, Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from types import NoneType, SimpleNamespace, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from unispect.errors import CalibrationError, ConfigError, DataError, unknown_name

T = TypeVar("T")


def read_toml(path: Path) -> dict[str, Any]:
    """The table in a TOML file."""
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"settings file {path} cannot be read: {error.strerror}") from error
    except ValueError as error:  # not TOML, or not UTF-8
        raise ConfigError(f"settings file {path} is not TOML: {error}") from error


def write_toml(table: Mapping[str, Any]) -> str:
    """TOML text of a table. TOML has no null: what is None is left out, and so gets its default when read."""
    import tomli_w

    return tomli_w.dumps(_without_none(table))


def merge(base: Mapping[str, Any], override: Mapping[str, Any]) -> dict[str, Any]:
    """A new table: `base`, with what `override` says in its place, table by table.

    >>> merge({"hgad": {"blocks": 8, "seed": 0}}, {"hgad": {"blocks": 4}})
    {'hgad': {'blocks': 4, 'seed': 0}}
    """
    merged = deepcopy(dict(base))
    for name, value in override.items():
        deeper = isinstance(value, Mapping) and isinstance(merged.get(name), Mapping)
        merged[name] = merge(merged[name], value) if deeper else deepcopy(value)
    return merged


def assignment(text: str) -> dict[str, Any]:
    """The table that `section.name=value` says. The value is TOML; what is not TOML is a bare string.

    >>> assignment("hgad.blocks=8"), assignment("hgad.scoring=marginal")
    ({'hgad': {'blocks': 8}}, {'hgad': {'scoring': 'marginal'}})
    """
    name, equals, value = text.partition("=")
    parts = [part.strip() for part in name.split(".")]
    if not equals or not all(parts):
        raise ConfigError(f"setting {text!r}: expected section.name=value, such as hgad.blocks=8")
    table: Any = _value(value.strip())
    for part in reversed(parts):
        table = {part: table}
    return dict(table)


def construct(factory: Callable[..., T], table: Mapping[str, Any], where: str, **provided: Any) -> T:
    """`factory` called with the settings in `table`, each checked against its annotation.

    where      the section's name, for errors
    provided   arguments that the caller gives and the user cannot set
    """
    given = _checked(factory, table, where, provided)
    try:
        return factory(**given, **provided)
    except (DataError, CalibrationError):
        raise  # no setting is to blame
    except ValueError as error:
        raise ConfigError(f"{_section(where)}{error}") from error


def settings(
    factory: Callable[..., Any], table: Mapping[str, Any], skip: Collection[str] = (), where: str = ""
) -> dict[str, Any]:
    """The complete table, defaults included, in plain values for TOML and JSON.

    skip   arguments that are provided to `construct` and are no settings
    """
    given = _checked(factory, table, where, skip)
    parameters = _parameters(factory, skip)
    return {name: _plain(given.get(name, parameter.default)) for name, parameter in parameters.items()}


def _checked(factory: Callable[..., Any], table: Mapping[str, Any], where: str, provided: Collection[str]) -> dict[str, Any]:
    parameters = _parameters(factory, provided)
    for name in table:
        if name not in parameters:
            raise ConfigError(f"{_section(where)}{unknown_name('setting', name, parameters)}")
    missing = [name for name, known in parameters.items() if known.default is known.empty and name not in table]
    if missing:
        raise ConfigError(f"{_section(where)}{', '.join(missing)} missing: no default, expected a value")
    return {name: _setting(value, parameters[name].annotation, name, where) for name, value in table.items()}


def _parameters(factory: Callable[..., Any], without: Collection[str]) -> dict[str, inspect.Parameter]:
    """What may be set: the named arguments of a function or class, their annotations resolved."""
    by_name = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    scope = getattr(factory.__init__ if inspect.isclass(factory) else factory, "__globals__", {})
    return {
        name: parameter.replace(annotation=_resolved(parameter.annotation, scope))
        for name, parameter in inspect.signature(factory).parameters.items()
        if parameter.kind in by_name and name not in without
    }


def _resolved(annotation: Any, scope: dict[str, Any]) -> Any:
    """The type that an annotation names; one that only a type checker knows is not checked here."""
    if annotation is inspect.Parameter.empty:
        return Any
    try:
        return get_type_hints(SimpleNamespace(__annotations__={"it": annotation}), globalns=scope)["it"]
    except NameError:
        return Any


def _section(where: str) -> str:
    return f"[{where}] " if where else ""


class _MismatchError(Exception):
    """A value is not of the wanted type; the text says what was expected."""


def _setting(value: Any, wanted: Any, name: str, where: str) -> Any:
    try:
        return _converted(value, wanted)
    except _MismatchError as error:
        key = f"{where}.{name}" if where else name
        raise ConfigError(f"{key}={value!r}: expected {error}, got {_kind(value)}") from None


def _converted(value: Any, wanted: Any) -> Any:
    """The value as the wanted type: an int may stand for a float, a list for a tuple, a text for a path."""
    origin = get_origin(wanted) or wanted
    if wanted is Any:
        return value
    if origin in (Union, UnionType):
        return _one_of(value, wanted)
    if origin is Literal:
        return _choice(value, get_args(wanted))
    if origin in (list, tuple, Sequence):
        return _sequence(value, wanted)
    return _single(value, origin, wanted)


def _single(value: Any, kind: Any, wanted: Any) -> Any:
    if kind is float and type(value) is int:
        return float(value)
    if kind is Path and isinstance(value, str):
        return Path(value)
    # True is an int to Python, but not to a person.
    fits = isinstance(value, kind) and (kind is not int or not isinstance(value, bool))
    if not fits:
        raise _MismatchError(_spelt(wanted))
    return value


def _one_of(value: Any, wanted: Any) -> Any:
    for member in get_args(wanted):
        try:
            return _converted(value, member)
        except _MismatchError:
            continue
    raise _MismatchError(_spelt(wanted))


def _choice(value: Any, choices: tuple[Any, ...]) -> Any:
    for choice in choices:
        if type(choice) is type(value) and choice == value:  # 1 == True
            return choice
    raise _MismatchError(f"one of {', '.join(map(repr, choices))}")


def _sequence(value: Any, wanted: Any) -> Any:
    """Each member converted; a tuple, unless a list is wanted."""
    kind, members = get_origin(wanted) or wanted, get_args(wanted)
    if not isinstance(value, list | tuple):
        raise _MismatchError(_spelt(wanted))
    fixed = kind is tuple and members and members[-1] is not Ellipsis
    if fixed and len(members) != len(value):
        raise _MismatchError(_spelt(wanted))
    kinds = members if fixed else (members[:1] or (Any,)) * len(value)
    try:
        converted = [_converted(part, member) for part, member in zip(value, kinds, strict=True)]
    except _MismatchError:
        raise _MismatchError(_spelt(wanted)) from None
    return converted if kind is list else tuple(converted)


_SPELT: dict[Any, str] = {bool: "true or false", NoneType: "nothing", str: "text", Path: "a path", float: "a number"}
_SPELT |= {int: "a whole number", dict: "a table"}


def _spelt(wanted: Any) -> str:
    """A type in the reader's words: tuple[int, ...] is `a list [a whole number, ...]`."""
    origin, members = get_origin(wanted) or wanted, get_args(wanted)
    if origin in (Union, UnionType):
        return " or ".join(_spelt(member) for member in members if member is not NoneType)
    if origin is Literal:
        return f"one of {', '.join(map(repr, members))}"
    if origin in (list, tuple, Sequence):
        inner = ", ".join("..." if member is Ellipsis else _spelt(member) for member in members)
        return f"a list [{inner}]"
    return _SPELT.get(origin, getattr(origin, "__name__", str(wanted)))


def _kind(value: Any) -> str:
    return type(value).__name__


def _value(text: str) -> Any:
    """TOML value of a text, or the text. Dates and times stay text: no setting is one."""
    try:
        table = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        return text
    dated = isinstance(table["value"], datetime.date | datetime.time)
    return text if dated or len(table) > 1 else table["value"]


def _without_none(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _without_none(inner) for name, inner in value.items() if inner is not None}
    if isinstance(value, list | tuple):
        return [_without_none(inner) for inner in value]
    return value


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _plain(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return str(value) if isinstance(value, Path) else value
