"""How the fields of dataclasses become flags of a command line, with their checks.

A field says all that is to be known of its flag: type, default, help, what the value must be, and
beside which other flags it acts. configs.py holds the fields.
"""

import argparse
import dataclasses
import difflib
import math
import re
import types
import typing
from dataclasses import field, fields
from typing import Literal

# What a value must be: (words, test).
POSITIVE = "be positive", lambda x: x > 0
NOT_NEGATIVE = "not be negative", lambda x: x >= 0
BELOW_ONE = "be in [0, 1)", lambda x: 0 <= x < 1
SHARE = "be in (0, 1]", lambda x: 0 < x <= 1
PROBABILITY = "be in [0, 1]", lambda x: 0 <= x <= 1
# What another flag must be, likewise, where it is not one of some values.
GIVEN = "", lambda x: x is not None
FOLDER = " DIR", lambda x: x not in (None, "shapes")
ABOVE_ZERO = " above 0", lambda x: x > 0


def flag(default, help: str, must=None, **only):
    """A dataclass field that is also a command-line flag; `help` is its line in --help.

    must: one of the pairs above. only: the flag acts only where another one has this value, or one
    of these, or is GIVEN, a FOLDER or ABOVE_ZERO; given elsewhere it is an error.
    """
    return field(default=default, metadata={"help": help, "must": must, "only": only})


def also(config, name: str, **only):
    """The flag `name` of another dataclass, which acts here only where `only` holds too."""
    f = next(f for f in fields(config) if f.name == name)
    return flag(f.default, f.metadata["help"], f.metadata["must"], **only, **f.metadata["only"])


def flag_name(name: str) -> str:
    return "--" + name.replace("_", "-")


def short_name(model: str) -> str:
    """A ViT's name elsewhere as here: vit_base_patch16_224, vit_b_16 and ViT-B/16 are B16."""
    sizes = dict(tiny="Ti", small="S", base="B", large="L", huge="H", gigantic="G", giant="g")
    for word, letter in sizes.items():
        model = model.replace(word, letter)
    found = re.search(r"(?<![a-zA-Z])(Ti|[SBLHGgsblh])[_/-]?(?:patch)?(\d+)", model)
    return re.sub("[sblh]", lambda m: m[0].upper(), found[1]) + found[2] if found else model


def unknown(what: str, value: str, known, listed: bool = True) -> str:
    """What to say of a value that is none of the known ones, with the nearest."""
    near = [short_name(value)]
    near = near if near[0] in known else difflib.get_close_matches(value, known, n=1)
    hint = f" Did you mean {near[0]}?" if near else ""
    return f"{what} {value!r} is unknown{'; known: ' + ', '.join(known) if listed else ''}.{hint}"


def check(config) -> None:
    """Raises ValueError for a field that is not what its flag says it must be."""
    hints = typing.get_type_hints(type(config))
    for f in fields(config):
        value, must = getattr(config, f.name), f.metadata["must"]
        literal = [t for t in (hints[f.name], *typing.get_args(hints[f.name]))
                   if typing.get_origin(t) is Literal]
        if literal and value is not None and value not in typing.get_args(literal[0]):
            raise ValueError(unknown(flag_name(f.name), str(value), typing.get_args(literal[0])))
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(number, float) and not math.isfinite(number):
                raise ValueError(f"{flag_name(f.name)} {number} must be a finite number")
        if must and value is not None and not must[1](value):
            raise ValueError(f"{flag_name(f.name)} {value} must {must[0]}")


class Checked:
    """A base of dataclasses of flags: each of them is checked when it is made."""

    def __post_init__(self):
        check(self)


def check_only(config, given: dict) -> None:
    """Raises ValueError for a flag that was given and would have no effect."""
    for f in fields(config):
        for other, legal in f.metadata.get("only", {}).items() if f.name in given else ():
            if legal not in (GIVEN, FOLDER, ABOVE_ZERO):
                values = legal if isinstance(legal, tuple) else (legal,)
                legal = " " + " or ".join(values), values.__contains__
            if not legal[1](getattr(config, other)):
                value = getattr(config, other)
                beside = (f"without {flag_name(other)}" if value is None else
                          f"with {flag_name(other)} {value}")
                raise ValueError(f"{flag_name(f.name)} has no effect {beside}; it needs "
                                 f"{flag_name(other)}{legal[0]}")


def to_plain(config) -> dict:
    """A dataclass of flags as a dict of plain types, for checkpoints and logs."""
    return {k: list(v) if isinstance(v, tuple) else v
            for k, v in dataclasses.asdict(config).items()}


def read_flags(classes, argv: list[str] | None = None) -> dict:
    """The fields of these dataclasses that a command line gives (default: sys.argv). The first
    one's docstring begins with the program's name. argparse exits with code 2 for types and for
    unknown flags, with the nearest known one."""
    program, text = classes[0].__doc__.split(":", 1)
    all_fields = [f for one in classes for f in fields(one)]
    needed = [f.name.upper() for f in all_fields if f.default is dataclasses.MISSING]  # no flags
    parser = argparse.ArgumentParser(
        prog=program, usage=" ".join([program, *needed, "[flags]"]), description=text.strip(),
        allow_abbrev=False, argument_default=argparse.SUPPRESS)
    for one in classes:
        group, hints = parser.add_argument_group(one.__name__), typing.get_type_hints(one)
        for f in fields(one):
            add_flag(group, f, hints[f.name])
    known, rest = parser.parse_known_args(argv)
    if rest:
        flags = [flag_name(f.name) for f in all_fields if f.default is not dataclasses.MISSING]
        odd = rest[0].split("=")[0]
        if not odd.startswith("-"):
            parser.error(f"{odd!r} belongs to no flag: none is before it, or one that takes no "
                         f"value, or no more")
        words = odd.lstrip("-")
        near = ([flag for flag in flags if flag.endswith(words)]
                or [flag_name(f.name) for f in all_fields
                    if "-" in words and words.replace("-", " ") in f.metadata["help"]]
                or difflib.get_close_matches(odd, flags, 1, 0))
        parser.error(f"unknown flag {odd}; did you mean {' or '.join(near)}?")
    return vars(known)


def parse(cls, argv: list[str] | None = None) -> tuple:
    """Reads a command line (default: sys.argv) into (config, the fields given as flags).

    Raises ValueError for values that are illegal, contradict each other or would have no effect;
    exits with code 2 for unknown flags, with the nearest known one, and for types.
    """
    given = read_flags([cls], argv)
    config = cls(**given)
    check_only(config, given)
    return config, given


def add_flag(group, f, hint) -> None:
    """Adds a field to an argparse group, by its type hint; one without default is positional."""
    text, default = f.metadata["help"], f.default
    if default not in (None, dataclasses.MISSING) and "default:" not in text:
        text += f" [{','.join(map(str, default)) if isinstance(default, tuple) else default}]"
    name, options = flag_name(f.name), dict(help=text.replace("%", "%%"), **_argparse_type(hint))
    if default is dataclasses.MISSING:
        name, options["metavar"] = f.name, f.name.upper()
    group.add_argument(name, **options)


def _argparse_type(hint) -> dict:
    """add_argument's keywords for a field's type hint."""
    options = [t for t in typing.get_args(hint) if t is not types.NoneType]
    if typing.get_origin(hint) in (types.UnionType, typing.Union) and len(options) == 1:
        hint = options[0]
    if typing.get_origin(hint) is Literal:
        return dict(choices=typing.get_args(hint))
    if hint is bool:
        return dict(action=argparse.BooleanOptionalAction)
    if hint in (int, float, str):
        return dict(type=hint, metavar=hint.__name__.upper())
    if hint == list[str]:
        return dict(nargs="+")
    if typing.get_origin(hint) is tuple:
        kinds = typing.get_args(hint)
        return dict(type=_numbers(kinds), metavar="N,M" if kinds == (int, int) else "R,G,B")
    return dict(type=_image_size, metavar="SIZE")


def _image_size(text: str) -> int | tuple[int, int]:
    """'224' is 224; '224,448' and '224x448' are (224, 448)."""
    if not re.fullmatch(r"\d+([x,]\d+)?", text):
        raise argparse.ArgumentTypeError(f"{text!r} must be a side in pixels, or HEIGHT,WIDTH")
    sides = [int(side) for side in text.replace("x", ",").split(",")]
    return sides[0] if len(sides) == 1 else tuple(sides)


def _numbers(kinds):
    what = f"{len(kinds)} {'whole ' * (int in kinds)}numbers"

    def numbers(text: str) -> tuple:
        try:
            return tuple(kind(value) for kind, value in zip(kinds, text.split(","), strict=True))
        except ValueError as e:
            raise argparse.ArgumentTypeError(f"{text!r} must be {what} with commas between") from e
    return numbers
