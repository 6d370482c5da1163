"""The blocks of a configuration as pydantic models, and pydantic's errors in our words.

:mod:`~grap_solo.training.schema` declares the blocks.
"""

from __future__ import annotations

import difflib
import types
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model, model_validator
from pydantic.fields import FieldInfo
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from grap_solo.errors import ConfigError
from grap_solo.keys import Key, missing_key, unknown_key

A_BLOCK = "a block of keys"
NEAR_MISS = 0.85
"""How similar an unknown key must be to a known one to count as a misspelling."""


@dataclass(frozen=True)
class OneOf:
    """Restricts a field to some texts."""

    options: tuple[str, ...]

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> CoreSchema:
        return core_schema.literal_schema(list(self.options))


def unfilled(**constraints: Any) -> Any:
    """A field that is not filled in. Its default is the base class's (solo-learn's or ours) or the
    Trainer's."""
    return Field(default=None, exclude=True, **constraints)


def nested(**constraints: Any) -> Any:
    """A field for a block of keys, checked and filled in even if the block is left out."""
    return Field(default_factory=dict, validate_default=True, **constraints)


class Block(BaseModel):
    """A block of keys. It may have further keys, as solo-learn's files do, unless such a key looks
    like a misspelling of a known one."""

    model_config = ConfigDict(
        strict=True,
        extra="allow",
        allow_inf_nan=False,
        str_min_length=1,
        protected_namespaces=(),
    )

    @model_validator(mode="before")
    @classmethod
    def refuse_near_misses(cls, given: Any) -> Any:
        """Refuses an unknown key that is almost a known one."""
        for key in given if isinstance(given, Mapping) else ():
            if key not in cls.model_fields and difflib.get_close_matches(
                str(key), cls.model_fields, n=1, cutoff=NEAR_MISS
            ):
                raise PydanticCustomError("near_miss", "near miss", {"key": key})
        return given


class Strict(Block):
    """A block that may have no further keys."""

    model_config = ConfigDict(extra="forbid")


def keys_model(keys: Mapping[str, Key], base: type[Block] = Block) -> type[Block]:
    """The model of a block with these keys besides those of its base."""
    fields: dict[str, Any] = {name: _field_of(key) for name, key in keys.items()}
    model: type[Block] = create_model("Keys", __base__=base, **fields)
    return model


def validate(model: type[Block], plain: dict[str, Any]) -> dict[str, Any]:
    """Checks a configuration. Returns it with its defaults, but without :func:`unfilled` keys and
    the ``weighting`` block, whose defaults the rule fills in.

    Args:
        model: the whole configuration's.
        plain: the configuration, without nulls.

    Raises:
        ConfigError: an unknown or missing key, or a value that its key cannot take.
    """
    try:
        return model.model_validate(plain).model_dump()
    except ValidationError as error:
        raise _one_line(model, error) from None


def key_of(field: FieldInfo) -> Key:
    """The key that a field stands for."""
    given: dict[str, Any] = {}
    for each in field.metadata:
        if isinstance(each, Key):
            return each
        if isinstance(each, OneOf):
            given["choices"] = each.options
        for name, bound in (("least", "ge"), ("above", "gt"), ("most", "le"), ("below", "lt")):
            if hasattr(each, bound):
                given[name] = getattr(each, bound)
    kind = field.annotation
    if get_origin(kind) in (Union, types.UnionType):
        kind, *_ = get_args(kind)
    if get_origin(kind) is Annotated:
        kind, *more = get_args(kind)
        given["choices"] = next(each.options for each in more if isinstance(each, OneOf))
    assert isinstance(kind, type)
    return Key(kind, default=field.default, optional=True, doc=field.description or "", **given)


def _field_of(key: Key) -> tuple[Any, Any]:
    """A key's annotation and field for ``create_model``."""
    bounds: dict[str, Any] = {"ge": key.least, "gt": key.above, "le": key.most, "lt": key.below}
    limits: Any = Field(**{name: value for name, value in bounds.items() if value is not None})
    kind: Any = Annotated[key.kind, limits]
    if key.kind is dict:
        kind = dict[str, Annotated[float, limits]]
        if key.each is list:
            several = Field(min_length=1)
            kind = dict[str, Annotated[list[Annotated[float, limits]], several]]
    elif key.choices:
        texts: Any = Annotated[str, OneOf(key.choices)]
        kind = texts if key.kind is str else texts | kind
    default = ... if key.required else key.default
    out = key.default is None and not key.required
    return Annotated[kind, key], Field(default, exclude=out, description=key.doc)


def _one_line(model: type[Block], error: ValidationError) -> ConfigError:
    """pydantic's first error in our words. A misspelled key comes first: others may follow from
    it."""
    unknown = ("near_miss", "extra_forbidden", "invalid_key")
    found = min(error.errors(), key=lambda each: each["type"] not in unknown)
    location, value = list(found["loc"]), found["input"]
    if found["type"] in ("extra_forbidden", "invalid_key"):
        value = location.pop()
    elif found["type"] == "near_miss":
        value = found["ctx"]["key"]
    path: list[str] = []
    node: type[Block] | None = model
    field: FieldInfo | None = None
    while location and node is not None:
        path.append(str(location.pop(0)))
        field = node.model_fields[path[-1]]
        node = block_of(field)
        if location and _holds_blocks(field):
            path.append(str(location.pop(0)))
    where = ".".join(path)
    if found["type"] in unknown:
        assert node is not None
        return unknown_key(where or "configuration", value, node.model_fields)
    if found["type"] == "missing":
        return missing_key(where)
    assert field is not None
    if found["type"] == "model_type" or field.title:
        return ConfigError(f"{where}: expected {field.title or A_BLOCK}, got {value!r}")
    key = key_of(field)
    if key.kind is dict and location:
        name, *place = location
        item = key.item.item if place else key.item
        return item.error(value, ".".join(map(str, [where, name, *place])))
    return key.error(value, where)


def block_of(field: FieldInfo) -> type[Block] | None:
    """The model of a field that is a block, or a block of such blocks; None of any other field."""
    return next((each for each in _parts_of(field.annotation) if is_block(each)), None)


def _holds_blocks(field: FieldInfo) -> bool:
    """Whether a field holds blocks of one model by their names."""
    mapping = any(get_origin(each) is dict for each in _parts_of(field.annotation))
    return mapping and block_of(field) is not None


def _parts_of(annotation: Any) -> list[Any]:
    """An annotation, and all types within it."""
    return [annotation, *(part for each in get_args(annotation) for part in _parts_of(each))]


def is_block(kind: Any) -> bool:
    """Whether a type is a block's model."""
    return isinstance(kind, type) and issubclass(kind, Block)
