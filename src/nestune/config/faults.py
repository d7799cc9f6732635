"""What is wrong with a configuration, in plain words: one line for each field, with what is allowed there."""

import difflib
import reprlib
import types
import typing
from collections.abc import Collection, Sequence
from typing import Any

from pydantic import BaseModel, ValidationError

from nestune.config.fields import hide_secrets

Location = tuple[str | int, ...]
LONGEST_WRITTEN_OUT = 10**40

# What a field must be, by pydantic's name of the fault; the parts in braces come from the fault.
ALLOWED = {
    "model_type": "a block of keys",
    "dict_type": "a block of keys",
    "tuple_type": "a list",
    "string_type": "text",
    "string_too_short": "text that is not empty",
    "string_pattern_mismatch": "letters, digits, '.', '_' and '-', starting with a letter or digit, "
    "at most 64 characters",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "int_type": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "finite_number": "a finite number",
    "greater_than": "a number above {gt:g}",
    "greater_than_equal": "a number, at least {ge:g}",
    "less_than": "a number below {lt:g}",
    "less_than_equal": "a number, at most {le:g}",
    "literal_error": "{expected}",
    "too_short": "a list, at least {min_length} long",
    "too_long": "a list, at most {max_length} long",
}


def explain(error: ValidationError, model: type[BaseModel]) -> list[str]:
    """A line for each faulty field of `model`: where it is, what is allowed, and what was seen."""
    by_field: dict[Location, list[Any]] = {}
    for fault in error.errors(include_url=False):
        by_field.setdefault(_follow(fault["loc"], model)[0], []).append(fault)
    # A fault of a whole follows from that of its part: an entry that is refused leaves its list too short, and a
    # list with a wrong entry is none of the other things that its field may be.
    return [
        _line(at, faults, model) for at, faults in by_field.items() if _of_a_key(faults) or not _within(at, by_field)
    ]


def _of_a_key(faults: Sequence[Any]) -> bool:
    """Whether what is wrong is a key of a mapping; its value is another matter."""
    return any(fault["loc"][-1:] == ("[key]",) for fault in faults)


def _within(at: Location, faulty: Collection[Location]) -> bool:
    return any(other != at and other[: len(at)] == at for other in faulty)


def _line(at: Location, faults: Sequence[Any], model: type[BaseModel]) -> str:
    where = ".".join(map(str, at)) or "the configuration"
    first = faults[0]
    if first["type"] == "missing":
        return f"{where}: missing; add it."
    if first["type"] == "extra_forbidden":
        known = _known_keys(at[:-1], model)
        close = difflib.get_close_matches(str(at[-1]), known, n=1)
        hint = f"did you mean {close[0]}? " if close else ""
        return f"{where}: unknown key; {hint}Known here: {', '.join(known)}."
    told = [fault["msg"].removeprefix("Value error, ").rstrip(".") for fault in faults if fault["type"] not in ALLOWED]
    # A field that may be one of several things has a fault for each of them.
    allowed = [ALLOWED[fault["type"]].format(**fault.get("ctx", {})) for fault in faults if fault["type"] in ALLOWED]
    message = "; ".join(told) or f"must be {', or '.join(dict.fromkeys(allowed))}"
    if first["type"] == "model_type":
        message += f": {', '.join(_known_keys(at, model))}"
    # A password is not for the screen; a whole block is more than a line holds, and its fault names the field.
    hidden = "password" in message or (isinstance(first["input"], (dict, BaseModel)) and _known_keys(at, model))
    seen = "" if hidden else f" (seen: {shown(first['input'])})"
    return f"{where}: {message[:1].lower() + message[1:]}{seen}."


def shown(value: Any) -> str:
    """A value as a message holds it: its beginning, however long, deep or large it is."""
    return f"{hide_secrets(_SHORT.repr(value)):.80}"


class _Short(reprlib.Repr):
    """Writes only the beginning of a value."""

    def repr_int(self, x: int, level: int) -> str:
        # Python refuses to write out the longest ones.
        return repr(x) if abs(x) < LONGEST_WRITTEN_OUT else f"a whole number of {x.bit_length()} bits"


_SHORT = _Short()
_SHORT.maxlevel, _SHORT.maxdict, _SHORT.maxlist, _SHORT.maxtuple = 4, 16, 16, 16
_SHORT.maxstring = _SHORT.maxother = 100


def _known_keys(at: Location, model: type[BaseModel]) -> list[str]:
    block = _follow(at, model)[1]
    return sorted(block.model_fields) if hasattr(block, "model_fields") else []


def _follow(location: Location, model: type[BaseModel]) -> tuple[Location, Any]:
    """The keys and indices of a location, without the branches of unions that pydantic puts in; and the type there."""
    at: list[str | int] = []
    block: Any = model
    for part in location:
        if hasattr(block, "model_fields"):
            at.append(part)
            field = block.model_fields.get(str(part))
            block = _block_or_none(field.annotation) if field else None
        elif typing.get_origin(block) is dict:
            at.append(part)
            block = typing.get_args(block)[1]
        elif isinstance(part, int):
            at.append(part)
    return tuple(at), block


def _block_or_none(annotation: Any) -> Any:
    """The block where one may be left out: B for `B | None`; any other type as it is."""
    branches = typing.get_args(annotation) if isinstance(annotation, types.UnionType) else ()
    return next((branch for branch in branches if hasattr(branch, "model_fields")), annotation)
