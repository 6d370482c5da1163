"""The schema: every key has one home, and both ways to it give the same errors."""

import runpy

import pytest
from helpers import METHOD_KWARGS, ROOT
from torch import nan

from grap_solo import ConfigError
from grap_solo.arguments import build_parser
from grap_solo.keys import Key
from grap_solo.methods import METHODS, CompositeMethod
from grap_solo.methods.composite import CONFIG_KEYS
from grap_solo.training.blocks import block_of, key_of, validate
from grap_solo.training.schema import Configuration, schema_of
from grap_solo.weighting import WEIGHTINGS

DOCS = ROOT / "docs"
HELP = ("-h", "--help")
BAD = [-1, 0, 1, 1.5, 10**6, True, "nonsense", "refrence", [1], {"a": -1.0}, {"a": 1.0}, nan]
MINIMAL = {
    "name": "run",
    "method": "grap_vicreg",
    "backbone": {"name": "resnet18"},
    "data": {"dataset": "digits"},
    "optimizer": {
        "name": "sgd",
        "batch_size": 8,
        "lr": 0.1,
        "classifier_lr": 0.1,
        "weight_decay": 0,
    },
    "scheduler": {"name": "none"},
    "max_epochs": 1,
    "method_kwargs": METHOD_KWARGS["vicreg"],
}


def fields(model, prefix=""):
    """Every field of a model that is no block, by its full name."""
    for name, field in model.model_fields.items():
        block = block_of(field)
        if block is None:
            yield prefix + name, field
        else:
            yield from fields(block, f"{prefix}{name}.")


@pytest.mark.parametrize(
    "file, function", [("configuration", "page"), ("commands", "commands_page")]
)
def test_a_reference_is_what_the_code_says(file, function):
    page = runpy.run_path(str(ROOT / "scripts" / "reference.py"))[function]()
    assert (DOCS / f"{file}.md").read_text() == page, "run python scripts/reference.py"


def test_every_command_and_flag_is_in_the_reference():
    text = (DOCS / "commands.md").read_text()
    for name, parser in build_parser()[1].items():
        section = text.partition(f"\n## {name}\n")[2].partition("\n## ")[0]
        for action in parser._actions:
            assert all(f"`{flag}`" in section for flag in action.option_strings if flag not in HELP)
            assert action.dest == "help" or action.help.replace("|", r"\|") in section
        assert parser.epilog.rpartition("example: ")[2] in section


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("rule", WEIGHTINGS)
def test_every_key_says_what_it_means(method, rule):
    found = dict(fields(schema_of(METHODS[method], WEIGHTINGS[rule])))
    assert {f"weighting.{key}" for key in WEIGHTINGS[rule].keys} <= set(found)
    assert {f"method_kwargs.{key}" for key in METHODS[method].all_keys()} <= set(found)
    for name, field in found.items():
        assert field.description.endswith((".", "`.")), name
        assert field.title or key_of(field).describe(), name


def outcome(function, *args, **kwargs):
    """The text of the error that a call ends in; None if it is accepted."""
    try:
        function(*args, **kwargs)
    except ConfigError as error:
        return str(error)
    return None


@pytest.mark.parametrize("name", WEIGHTINGS)
def test_a_rules_constructor_and_its_block_refuse_the_same_values_in_the_same_words(name):
    rule = WEIGHTINGS[name]
    model = schema_of(METHODS["vicreg"], rule)
    refused = set()
    for key in [*rule.keys, "alfa", "scal"]:
        for value in BAD:
            # GraP's learning rate alone does not say what a step does.
            given = ({"recipe": "alg1"} if (name, key) == ("grap", "lr") else {}) | {key: value}
            text = outcome(rule, ["a"], **given)
            assert text == outcome(validate, model, MINIMAL | {"weighting": given}), given
            refused |= {key} if text else set()
    assert refused == {*rule.keys, "alfa", "scal"}


def test_defaults_are_filled_in_and_those_of_the_base_class_are_not():
    filled = validate(schema_of(METHODS["vicreg"], WEIGHTINGS["grap"]), MINIMAL)
    assert filled["seed"] == 5 and filled["labels"] == {
        "fraction": 1.0,
        "split": "train",
        "path": None,
        "val_path": None,
    }
    for block, keys in CONFIG_KEYS.items():
        for name, key in keys.items():
            assert filled[block][name] == key.default
    assert filled["method_kwargs"]["sim_loss_weight"] == 25.0
    assert not filled["method_kwargs"]["separate_projectors"]
    assert "knn_eval" not in filled and "momentum" not in filled and "weighting" not in filled
    assert filled["scheduler"] == {"name": "none", "interval": "step"}


def test_a_key_is_required_optional_or_has_a_default():
    assert Key(int, 1).required
    assert not Key(int, 1, 5).required and not Key(int, 1, optional=True).required
    assert {name for name, field in Configuration.model_fields.items() if field.is_required()} == {
        "name", "method", "max_epochs",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("key", "words"),
    [
        (Key(int, 1), "a whole number of 1 or more"),
        (Key(float, above=0), "a number above 0"),
        (Key(float, 0, below=1), "a number of 0 or more and below 1"),
        (Key(float, above=0, most=0.5), "a number above 0 and up to 0.5"),
        (Key(bool), "True or False"),
        (Key(str), "a text"),
        (Key(str, choices=("a", "b")), "one of a, b"),
        (Key(float, above=0, choices=("a",)), "one of a, or a number above 0"),
        (Key(dict, 0), "a block with a number of 0 or more for each term"),
    ],
)
def test_a_key_says_its_range_in_words(key, words):
    assert key.describe() == words


def test_a_method_of_ones_own_may_leave_out_an_optional_key():
    class Own(CompositeMethod):
        method_keys = {"size": Key(int, 1, optional=True, doc="A size."), "width": Key(int)}

    model = schema_of(Own, WEIGHTINGS["grap"])
    assert (
        "size" not in validate(model, MINIMAL | {"method_kwargs": {"width": -3}})["method_kwargs"]
    )
    with pytest.raises(ConfigError, match=r"method_kwargs\.width: missing: add it"):
        validate(model, MINIMAL | {"method_kwargs": {"size": 3}})
