"""YAML files that people write: their values, checked, and what is wrong with them in one line for each key."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.constructor import ConstructorError, SafeConstructor
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import Node
from ruamel.yaml.reader import ReaderError

from crt.errors import UserError

# What pydantic calls the types, in the words of who writes the file.
_WORDS = {
    "a valid integer": "a whole number",
    "a valid number": "a number",
    "a valid boolean": "true or false",
    "a valid string": "text",
    "a valid list": "a list",
    "a valid dictionary": "a mapping",
}


class Section(BaseModel):
    """A mapping of a YAML file: unknown keys are refused and no type is coerced (int to float apart)."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


Checked = TypeVar("Checked", bound=Section)


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Read a YAML 1.2 mapping, as DVC does (PyYAML would read `1e-5` as text).

    Raises:
        UserError: the file is missing, unreadable, no YAML, not a mapping, or holds a value that cannot be read.
    """
    yaml = YAML(typ="safe", pure=True)
    yaml.Constructor = _Constructor
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        elsewhere = isinstance(error, FileNotFoundError) and not Path("dvc.yaml").exists()
        remedy = "run from the project's root folder" if elsewhere else "give the path of a YAML file"
        if isinstance(error, UnicodeDecodeError):
            remedy = f"save it as UTF-8, or {remedy}"
        raise UserError(f"{path}: cannot be read ({_reason(error)}): {remedy}") from None
    try:
        values = yaml.load(text)
    except YAMLError as error:
        raise UserError(f"{path}: {_yaml_message(error)}") from None
    except RecursionError:
        raise UserError(f"{path}: not valid YAML: lists or mappings are nested too deep: make it flatter") from None
    except AssertionError as error:  # the parser's own, of `%YAML 1.3`
        raise UserError(f"{path}: not valid YAML: {error}: leave the %YAML line out") from None
    except (ValueError, OverflowError) as error:  # likewise, of an escape such as "\UFFFFFFFF"
        raise UserError(f"{path}: not valid YAML: a text has an impossible escape ({error}): correct it") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: is not a mapping of keys to values: give a file of lines `key: value`")
    return values


class _Constructor(SafeConstructor):
    """Says where a value stands that looks like a number or a date and is none; ruamel lets Python's error through."""

    def construct_object(self, node: Node, deep: bool = False) -> Any:
        try:
            value = super().construct_object(node, deep=deep)
            if isinstance(value, int):
                float(value)  # a number that no key may have, and that later could not even be printed
            return value
        except (ValueError, OverflowError, LookupError, TypeError, AttributeError) as error:
            # Python adds advice for programmers behind a semicolon.
            reason = str(error).partition(";")[0] or type(error).__name__
            message = f"value cannot be read ({reason}): correct it, or put it into quotes if it is text"
            raise ConstructorError(None, None, message, node.start_mark) from None

    def check_mapping_key(self, node: Node, key_node: Node, mapping: Any, key: Any, value: Any) -> bool:
        if key in mapping:
            raise ConstructorError(
                None,
                None,
                f"the key {in_yaml(key)} stands here a second time: remove one of the two",
                key_node.start_mark,
            )
        return True


def _yaml_message(error: YAMLError) -> str:
    """What is wrong and where, without the lines that the parser quotes for programmers."""
    if isinstance(error, ReaderError):  # also of UTF-16 without its mark
        return f"not valid YAML: holds the character #x{error.character:04x}: save it as UTF-8 text without that"
    if not isinstance(error, MarkedYAMLError) or error.problem_mark is None:
        return f"not valid YAML: {' '.join(str(error).split())}"
    text = ", ".join(" ".join(part.split()) for part in (error.context, error.problem) if part)
    if "character '\\t'" in text:
        text += ": write spaces instead of tabs"
    return f"not valid YAML: line {error.problem_mark.line + 1}, column {error.problem_mark.column + 1}: {text}"


def in_yaml(value: Any) -> str:
    """A value as a YAML file would hold it: null rather than None, true rather than True."""
    try:
        return json.dumps(value, ensure_ascii=False, default=str)
    except (TypeError, ValueError):  # a list as a key, an alias within what it stands for
        return repr(value)


def _reason(error: Exception) -> str:
    return (error.strerror or str(error)) if isinstance(error, OSError) else "not UTF-8 text"


def checked(section: type[Checked], values: Mapping[str, Any], name: str | Path, hint: str = "") -> Checked:
    """The values of a file as a section.

    Args:
        section: which keys and values there may be.
        values: as read.
        name: stands for the file in messages.
        hint: where to look for a key that is missing.

    Raises:
        UserError: a key is unknown or missing, or a value not as it must be; one line for each.
    """
    try:
        return section.model_validate(values)
    except ValidationError as error:
        lines = [_explain(name, detail, section, hint) for detail in error.errors()]
        raise UserError("\n".join(lines)) from None


def _explain(name: str | Path, detail: Any, model: type[BaseModel], hint: str) -> str:
    """Turn one pydantic error into 'FILE: KEY: what is wrong: remedy'."""
    location = [str(part) for part in detail["loc"] if not _is_union_tag(part)]
    key = ".".join(location)
    kind = detail["type"]
    if kind in ("extra_forbidden", "invalid_key"):  # the latter are numbers and other things that are no text
        siblings = _field_names(model, location[:-1])
        close = difflib.get_close_matches(location[-1], siblings, n=1)
        remedy = f"did you mean {close[0]!r}?" if close else f"known keys: {', '.join(siblings)}"
        return f"{name}: {key}: unknown key: {remedy}"
    if kind == "missing":
        return f"{name}: {key}: missing: add it" + (f" ({hint})" if hint else "")
    if kind == "value_error":
        return ": ".join(part for part in (str(name), key, str(detail["ctx"]["error"])) if part)
    if kind == "model_type":
        return f"{name}: {key}: must be a mapping with the keys {', '.join(_field_names(model, location))}"
    if kind in ("too_short", "too_long"):
        few, limits = kind == "too_short", detail["ctx"]
        fault = (
            f"few entries: give at least {limits['min_length']}"
            if few
            else f"many entries: give at most {limits['max_length']}"
        )
        remedy = ", or write null" if type(None) in get_args(_annotation(model, location)) else ""
        return f"{name}: {key}: too {fault}{remedy}, got {in_yaml(detail['input'])}"
    message = detail["msg"].replace("Input should be", "must be")
    for pydantic_name, word in _WORDS.items():
        message = message.replace(pydantic_name, word)
    # A number, as YAML reads it, was meant as a name or a path.
    quotes = ": put it into quotes" if kind == "string_type" and isinstance(detail["input"], (int, float)) else ""
    return f"{name}: {key}: {message}, got {in_yaml(detail['input'])}{quotes}"


def _is_union_tag(part: Any) -> bool:
    # pydantic puts the branch of a union (int, list[int], constrained-int...) into the location.
    return isinstance(part, str) and (
        part in {"int", "str", "float", "none"} or "[" in part or part.startswith("constrained")
    )


def _field_names(model: type[BaseModel], location: Iterable[str]) -> list[str]:
    kind = _annotation(model, location)
    # Of `Contrast | None`, the section.
    sections = [part for part in (kind, *get_args(kind)) if isinstance(part, type) and issubclass(part, BaseModel)]
    return [field.alias or name for section in sections[:1] for name, field in section.model_fields.items()]


def _annotation(kind: Any, location: Iterable[str]) -> Any:
    """The type of what stands at a place of a file; None where no type is known."""
    for part in location:
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            kind = next((f.annotation for n, f in kind.model_fields.items() if (f.alias or n) == part), None)
        else:  # an entry of a mapping or a list
            kind = next(reversed(get_args(kind)), None)
    return kind
