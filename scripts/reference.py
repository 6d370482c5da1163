#!/usr/bin/env python
"""Writes docs/configuration.md and docs/commands.md, the references of every configuration key and
of every command: scripts/reference.py

Everything in them comes from the schema, the weighting rules, the methods and the command line's
parsers.
"""

from __future__ import annotations

import argparse
import inspect
import textwrap
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from grap_solo.arguments import Parser, build_parser
from grap_solo.keys import Key
from grap_solo.methods import METHODS, CompositeMethod
from grap_solo.solo.base import DEFAULTS, MOMENTUM_DEFAULTS
from grap_solo.training.blocks import Block, block_of, key_of
from grap_solo.training.config import OPTIMIZER_DEFAULTS
from grap_solo.training.schema import schema_of
from grap_solo.weighting import DEFAULT_WEIGHTING, WEIGHTINGS
from grap_solo.weighting.base import treatment_keys

DOCS = Path(__file__).parents[1] / "docs"
BASE_DEFAULTS = OmegaConf.merge(OmegaConf.create(DEFAULTS), OmegaConf.create(MOMENTUM_DEFAULTS))
FROM_CODE = ("method_kwargs", "weighting")  # Their keys depend on the method and the rule.

INTRODUCTION = """\
# Configuration keys

<!-- Written by scripts/reference.py from the package's schema: edit the keys there. -->

A configuration is a YAML file with solo-learn's keys and a few more. Every key below is checked
before any data is read; a mistake gives one line that names the key and the fix. A key that is
left out, or null, has its default. A key without a default is **required**. Other keys, such as
solo-learn's, are accepted, except in `labels`, `downstream`, `diagnostics` and `weighting`; a key
that looks like a misspelling of a known one is refused everywhere.
"""

DOWNSTREAM = """\
The block has an entry for each downstream head, by a name of your own; the table has the keys of an
entry. Without the block the only head is the online probe, which classifies. See
[Downstream heads](guides/downstream-heads.md).
"""

COMMANDS_INTRODUCTION = """\
# Commands

<!-- Written by scripts/reference.py from grap_solo/arguments.py: edit the parsers there. -->

`grap-solo COMMAND --help` prints the same. A command that trains takes `key=value`, which changes a
key of the [configuration](configuration.md) as hydra does: a key that the file does not have needs
a `+` in front, `++` sets a key in either case, and `~key` takes one out. Input that cannot be used
ends with one line that names the key, flag or file, and with exit code 2.
"""


def page() -> str:
    """The text of the page of configuration keys."""
    model = schema_of(METHODS["all4one"], WEIGHTINGS["fixed"])  # Of any.
    fields = model.model_fields
    blocks = {name: each for name, field in fields.items() if (each := block_of(field))}
    plain = [name for name in fields if name not in blocks]
    parts = [INTRODUCTION, "## First level\n", _fields(model, plain)]
    parts.append(
        "Any other argument of Lightning's `Trainer`, such as `log_every_n_steps`, may stand here "
        "too. An argument that a run sets itself, such as `logger`, is refused with a line that "
        "says what to set instead. `max_steps` and `max_time` end one start of a run and leave "
        "its schedules alone: start it again to resume.\n"
    )
    for name, each in blocks.items():
        if name not in FROM_CODE:
            parts += [f"## `{name}`\n", _fields(each, each.model_fields, f"{name}.")]
        if name == "downstream":
            parts.append(DOWNSTREAM)
        if name == "optimizer":
            parts.append(_optimizer_defaults())
    parts += [*_weighting(), *_methods()]
    return "\n".join(parts)


def _fields(model: type[Block], names: Iterable[str], prefix: str = "") -> str:
    """The table of a block's fields."""
    rows = []
    for name in names:
        field = model.model_fields[name]
        words = field.title or key_of(field).describe()
        if field.is_required():
            default = "**required**"
        elif field.exclude:
            default = _default(OmegaConf.select(BASE_DEFAULTS, prefix + name))
        else:
            default = _default(field.get_default(call_default_factory=True))
        rows.append((f"`{name}`", words, default, field.description or ""))
    return _table(rows)


def _keys(keys: Mapping[str, Key]) -> str:
    """The table of a rule's or method's keys."""
    return _table(
        (
            f"`{name}`",
            key.describe(),
            "**required**" if key.required else _default(key.default),
            key.doc,
        )
        for name, key in keys.items()
    )


def _table(rows: Iterable[tuple[str, ...]]) -> str:
    lines = ["| key | value | default | meaning |", "|---|---|---|---|"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)]) + "\n"


def _default(value: Any) -> str:
    if OmegaConf.is_config(value):
        value = OmegaConf.to_container(value)
    return "none" if value is None else f"`{value}`"


def _optimizer_defaults() -> str:
    parts = [
        f"{name}: {', '.join(f'{key} {value}' for key, value in defaults.items()) or 'none'}"
        for name, defaults in OPTIMIZER_DEFAULTS.items()
    ]
    return f"Defaults of `kwargs`: {'; '.join(parts)}.\n"


def _weighting() -> list[str]:
    """The keys of every rule."""
    shared = treatment_keys()
    plain = ", ".join(f"`{name}`" for name in METHODS)
    parts = [
        "## `weighting`\n",
        f"`name` is the rule: one of {', '.join(f'`{name}`' for name in WEIGHTINGS)}. Without "
        f"a `weighting` block the rule is `{DEFAULT_WEIGHTING}`; in a block, `name` is required. "
        f"{plain} take no such block.\n",
        "These keys say what is done with a rule's weights. Every rule but `supervised` takes "
        "them; where a rule's default differs, its section says so.\n",
        _keys(shared),
    ]
    for name, rule in WEIGHTINGS.items():
        own = {key: each for key, each in rule.keys.items() if key not in shared}
        other = [
            f"`{key}` is `{each.default}`"
            for key, each in rule.keys.items()
            if key in shared and each.default != shared[key].default
        ]
        parts += [f"### `{name}`\n", _first_sentence(rule)]
        if own:
            parts.append(_keys(own))
        if other:
            parts.append(f"By default {' and '.join(other)}.\n")
    return parts


def _methods() -> list[str]:
    """The keys of every method."""
    parts = ["## `method_kwargs`\n", "Every method takes:\n", _keys(CompositeMethod.all_keys())]
    for name, method in METHODS.items():
        keys = method.method_keys
        parts += [f"### `{name}` and `grap_{name}`\n", _keys(keys)]
    return parts


def _first_sentence(rule: type) -> str:
    """The first paragraph of a class's documentation, as Markdown."""
    text = inspect.getdoc(rule) or ""
    return text.split("\n\n")[0].replace("``", "`") + "\n"


def commands_page() -> str:
    """The text of the page of commands."""
    parts = [COMMANDS_INTRODUCTION]
    for name, parser in build_parser()[1].items():
        example = (parser.epilog or "").rpartition("example: ")[2]
        parts += [
            f"## {name}\n",
            f"{parser.description}\n",
            f"```text\n{_wrap(_usage(name, parser))}\n```\n",
            _arguments(parser),
            f"Example: `{example}`\n",
        ]
    return "\n".join(parts)


def _usage(name: str, parser: Parser) -> str:
    """A command's usage. Made here where the parser has none: argparse's differs by version."""
    if parser.usage:
        return " ".join(parser.usage.split())
    parts = []
    for action in _shown(parser):
        flag = action.option_strings[-1] if action.option_strings else ""
        text = " ".join(filter(None, (flag, _metavar(action))))
        parts.append(text if _is_required(action) else f"[{text}]")
    return " ".join(["grap-solo", name, *parts])


def _wrap(usage: str) -> str:
    return textwrap.fill(usage, 84, subsequent_indent="    ", break_on_hyphens=False)


def _arguments(parser: Parser) -> str:
    """The table of a command's arguments and flags, with that of its overrides."""
    lines = ["| argument | meaning |", "|---|---|"]
    for action in _shown(parser):
        flags = ", ".join(f"`{each}`" for each in action.option_strings)
        value = _metavar(action)
        left = " ".join(filter(None, (flags, f"`{value}`" if value else "")))
        lines.append(f"| {_escape(left)} | {_escape(action.help or '')} |")
    if (parser.epilog or "").startswith("key=value: "):
        text = (parser.epilog or "").partition("\n\nexample: ")[0].removeprefix("key=value: ")
        lines.append(f"| `key=value` | {' '.join(text.split())} |")
    return "\n".join(lines) + "\n" if len(lines) > 2 else ""


def _escape(text: str) -> str:
    """A text for a cell of a table."""
    return text.replace("|", "\\|")


def _shown(parser: Parser) -> list[argparse.Action]:
    """The arguments of a parser in order, positional ones first, without ``--help``."""
    actions = [each for each in parser._actions if each.dest != "help"]
    return sorted(actions, key=lambda each: bool(each.option_strings))


def _metavar(action: argparse.Action) -> str:
    """The value of an argument, as its usage names it; empty for a flag without a value."""
    if action.nargs == 0:
        return ""
    if isinstance(action.metavar, tuple):
        return " ".join(action.metavar)
    if action.choices:
        return "|".join(map(str, action.choices))
    name = action.metavar or action.dest.upper()
    return f"{name} ..." if action.nargs in ("+", "*", argparse.REMAINDER) else name


def _is_required(action: argparse.Action) -> bool:
    return action.required or (not action.option_strings and action.nargs not in ("?", "*"))


if __name__ == "__main__":
    for name, text in (("configuration.md", page()), ("commands.md", commands_page())):
        (DOCS / name).write_text(text)
        print(f"wrote docs/{name}")
