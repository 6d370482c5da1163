"""The class :class:`Key`, by which a rule or a method declares a configuration key."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any

from grap_solo.errors import ConfigError, unknown_name

NOUNS = {int: "a whole number", float: "a number", str: "a text", bool: "True or False"}


@dataclass(frozen=True)
class Key:
    """A key of a configuration. Its value may be left out if there is a default.

    Attributes:
        kind: ``int``, ``float``, ``str``, ``bool``, ``list`` for numbers, or ``dict`` for one
            ``each`` per name.
        least: a number's lower bound.
        default: the value of a key that is left out or null. Without a default the key is required,
            unless it is ``optional``.
        above: the number must be greater than this.
        below: the number must be less than this.
        most: a number's upper bound.
        choices: the valid texts. With choices, a number's key also accepts these texts.
        optional: whether the key may be left out although it has no default.
        each: the kind of a ``dict``'s values: ``float`` or ``list``.
        doc: what the key means, in one or two sentences.

    Raises:
        ConfigError: another ``kind``.
    """

    kind: type
    least: float | None = None
    default: Any = None
    _: KW_ONLY
    above: float | None = None
    below: float | None = None
    most: float | None = None
    choices: tuple[str, ...] = ()
    optional: bool = False
    each: type = float
    doc: str = ""

    def __post_init__(self) -> None:
        if self.kind not in (*NOUNS, list, dict):
            raise ConfigError(
                f"Key: its kind is a dict, list, int, float, str or bool, not {self.kind}"
            )

    @property
    def required(self) -> bool:
        """Whether the key must be given."""
        return self.default is None and not self.optional

    @property
    def item(self) -> Key:
        """The key of one value of a ``dict``, or of one number of a ``list``."""
        return Key(self.each if self.kind is dict else float, self.least)

    @property
    def _takes_any_text(self) -> bool:
        return self.kind is str and not self.choices

    def fits(self, value: Any) -> bool:
        """Whether the key can take a value."""
        if self.kind is dict:
            return isinstance(value, Mapping) and all(map(self.item.fits, value.values()))
        if self.kind is list:
            listed = isinstance(value, Sequence) and not isinstance(value, str)
            return listed and len(value) > 0 and all(map(self.item.fits, value))
        if self.kind is bool or isinstance(value, bool):
            return self.kind is bool and isinstance(value, bool)
        if self.kind is str or isinstance(value, str):
            return isinstance(value, str) and (value in self.choices or self._takes_any_text)
        if not isinstance(value, int if self.kind is int else (int, float)):
            return False
        return math.isfinite(value) and not (
            (self.least is not None and value < self.least)
            or (self.above is not None and value <= self.above)
            or (self.most is not None and value > self.most)
            or (self.below is not None and value >= self.below)
        )

    def check(self, value: Any, where: str) -> None:
        """Refuses a value that the key cannot take.

        Args:
            value: what was given.
            where: the key's full name, such as ``weighting.lr``.

        Raises:
            ConfigError: it does not fit.
        """
        if self.kind is dict and isinstance(value, Mapping):
            for name, each in value.items():
                self.item.check(each, f"{where}.{name}")
        elif not self.fits(value):
            raise self.error(value, where)

    def error(self, value: Any, where: str) -> ConfigError:
        """The error for a value that does not fit. See :meth:`check`."""
        if self.choices and isinstance(value, str):
            also = () if self.kind is str else (self.describe(choices=False),)
            return unknown_name(where, value, (*self.choices, *also))
        words = self.describe(choices=self.kind is str)
        if isinstance(value, float) and not math.isfinite(value):
            words = words.replace("a ", "a finite ", 1)
        if value == "":
            return ConfigError(f"{where}: expected {words}, got an empty text: give one")
        quoting = f": put a text into quotes: \"{where}='...'\"" if self._takes_any_text else ""
        return ConfigError(f"{where}: expected {words}, got {value!r}{quoting}")

    def describe(self, choices: bool = True) -> str:
        """The key's type and range in words, such as ``a whole number of 1 or more``.

        Args:
            choices: whether to name the choices too.
        """
        if self.kind is dict:
            return f"a block with {self.item.describe()} for each term"
        if self.kind is list:
            return (
                f"a list of {self.item.describe().removeprefix('a ').replace('number', 'numbers')}"
            )
        if self.choices and choices:
            number = "" if self.kind is str else f", or {self.describe(choices=False)}"
            return f"one of {', '.join(self.choices)}{number}"
        bounds = [
            "" if self.least is None else f"of {self.least:g} or more",
            "" if self.above is None else f"above {self.above:g}",
            "" if self.most is None else f"up to {_written_out(self.most)}",
            "" if self.below is None else f"below {self.below:g}",
        ]
        text = " and ".join(each for each in bounds if each)
        return f"{NOUNS[self.kind]} {text}".strip()


def _written_out(number: float) -> str:
    """A number in words: a whole one with all its digits."""
    return str(number) if isinstance(number, int) else f"{number:g}"


def read_keys(keys: Mapping[str, Key], given: Mapping[str, Any], block: str) -> dict[str, Any]:
    """The value of every key: the given one, or else its default.

    Args:
        keys: the keys that are valid.
        given: values by name. None stands for a value that is left out.
        block: where the keys stand, such as ``weighting``, for the errors.

    Raises:
        ConfigError: an unknown key, a value that does not fit, or a required key left out.
    """
    refuse_unknown(keys, given, block)
    values = {}
    for name, key in keys.items():
        value = given.get(name)
        if value is not None:
            key.check(value, f"{block}.{name}")
        elif key.required:
            raise missing_key(f"{block}.{name}")
        values[name] = key.default if value is None else value
    return values


def missing_key(where: str) -> ConfigError:
    """The error for a required key that is left out."""
    return ConfigError(f"{where}: missing: add it to the configuration file")


def refuse_unknown(keys: Mapping[str, Key], given: Mapping[str, Any], block: str) -> None:
    """Refuses a value whose key is not one of ``keys``. See :func:`read_keys`."""
    for name in given:
        if name not in keys:
            raise unknown_key(block, name, keys)


def unknown_key(block: str, name: object, valid: Iterable[str]) -> ConfigError:
    """The error for a key that a block does not have.

    Args:
        block: where the key was given.
        name: the key.
        valid: the block's keys.
    """
    options = list(valid)
    if not options:
        return ConfigError(f"{block}: takes no key besides its name: remove '{name}'")
    return unknown_name(block, name, options)
