"""Every field on the command line: set, unset, refused in a sentence; and fields that exclude."""

import os
import random
import sys

import pytest

from pgpsam_jax.config import exclusive_fields, overrides
from pgpsam_jax.config.defaults import default_config
from pgpsam_jax.config.serialization import MAX_INT, flatten, from_json, to_json, validate
from pgpsam_jax.errors import UserError
from tests.support.places import REPOSITORY
from tests.support.small_run import config_for

FIELDS = flatten(default_config().to_dict())


def given(*flags, config=None):
    """A configuration after flags of a command line."""
    rest, fields = overrides.split_flags(flags)
    assert not rest
    config = default_config() if config is None else config
    overrides.assign(config, fields, f"the flags {flags}")
    return config


def value(config, field):
    return flatten(config.to_dict())[field]


def kind_of(field):
    return overrides._default(field)[1]


def samples(field):
    """(text, value) pairs that the field takes."""
    default, kind = FIELDS[field], kind_of(field)
    if default is None:
        yield from (("None", None), ("none", None), ("", None))
    if kind is bool:
        yield from (("True", True), ("false", False), ("1", True), ("0", False))
    elif kind is int:
        yield from (("3", 3), ("-2", -2), ("1e3", 1000), (str(MAX_INT), MAX_INT))
    elif kind is float:
        yield from (("3", 3.0), ("-0.25", -0.25), ("1e-3", 1e-3), ("0", 0.0))
    elif kind is str:
        yield from (("a b=c", "a b=c"), ("7", "7"), ("--x", "--x"), ("ü/é.json", "ü/é.json"))
        yield from (("None", ""), ("", "")) if default == "" else ()
    elif default and type(default[0]) is float:
        yield from (("(0,100)", (0.0, 100.0)), ("-1, 2.5", (-1.0, 2.5)), ("[3,4]", (3.0, 4.0)))
    else:
        one, text = (("q",), "q,") if default else ((7,), "7,")
        yield from (("()", ()), ("", ()), (text, one), (text[0], one), (str(one), one))


@pytest.mark.parametrize("field", FIELDS)
def test_any_field_is_set_and_unset(field):
    for text, expected in samples(field):
        for flags in ([f"--config.{field}={text}"], [f"-config.{field}", text]):
            if kind_of(field) is bool and len(flags) == 2:
                continue
            found = value(given(*flags), field)
            assert found == expected and type(found) is type(expected), flags
    if kind_of(field) is bool:
        assert value(given(f"--config.{field}"), field) is True
        assert value(given(f"--noconfig.{field}"), field) is False
    back = given(f"--config.{field}={FIELDS[field]}")
    assert value(back, field) == FIELDS[field]
    if FIELDS[field] is None:
        assert to_json(back) == to_json(default_config())


@pytest.mark.parametrize("field", FIELDS)
def test_what_a_field_cannot_be_is_refused(field):
    wrong = {int: ["many", "1.5", "nan", "1e999", "True"], float: ["x", "1,5", "(1,)"], str: []}
    wrong |= {bool: ["maybe", "2", "None", ""], tuple: ["{1: 2}", "(1, (2,))", "(None,)"]}
    for text in wrong[kind_of(field)]:
        with pytest.raises(UserError, match=f"^{field} cannot be '.*; give "):
            given(f"--config.{field}={text}")
    if FIELDS[field] not in (None, "") and kind_of(field) is not str:
        with pytest.raises(UserError, match=f"{field} cannot be 'None'"):
            given(f"--config.{field}=None")
    if kind_of(field) is int:
        for number in (2**31, 2**32, 2**63, -(2**63), 10**400):
            with pytest.raises(
                UserError, match=f"{field} is .*; give a whole number from .* to {MAX_INT}"
            ):
                validate(given(f"--config.{field}={number}"))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--config.model.lora_rnk=3"], "no such .*model.lora_rnk; did you mean model.lora_rank"),
        (["--config.nowhere.at.all=3"], "no such configuration field: nowhere.at.all"),
        (["--config.model=3"], "model is a section"),
        (["--config.seed.x=3"], "no such configuration field: seed.x"),
        (["--config.=3"], "no such configuration field"),
        (["--config.seed"], "has no value"),
        (["--noconfig.seed"], "seed is not a switch"),
        (["--noconfig.eval.overlays=1"], "takes no value"),
        (["--config.train.steps=3", "--config.train.epochs=3"], "train.steps and train.epochs"),
    ],
)
def test_wrong_flags(flags, message):
    with pytest.raises(UserError, match=message):
        given(*flags)


def test_other_flags_are_left_alone():
    flags = ["--config", "a.py", "--config.seed", "-1", "--workdir=x.config.y", "--", "--config.a"]
    rest, fields = overrides.split_flags(flags)
    assert rest == ["--config", "a.py", "--workdir=x.config.y", "--", "--config.a"]
    assert fields == {"seed": "-1"}


SIZES = {"fraction": 0.5, "count": 16, "volumes": 2, "every": 3}


def test_what_is_set_later_counts():
    """Random layers of random settings: the last one is as it was said, and nothing contradicts."""
    draw = random.Random(0)
    for _ in range(80):
        config = default_config()
        for layer in range(draw.randrange(1, 5)):
            rule = draw.choice(list(exclusive_fields.RULES))
            taken = exclusive_fields.RULES[rule][0]
            fields = {"rule": rule} if draw.random() < 0.5 or not taken else {}
            if taken and (not fields or draw.random() < 0.5):
                size = draw.choice(taken)
                fields[size] = SIZES[size]
            if draw.random() < 0.2:
                fields = {"file": "list.txt"}
            overrides.assign(config, {f"fewshot.{k}": v for k, v in fields.items()}, str(layer))
            assert all(config.fewshot[key] == value for key, value in fields.items())
            validate(config)
            again = from_json(to_json(config))
            assert to_json(again) == to_json(config.copy_and_resolve_references())


@pytest.mark.parametrize("name", ["synapse", "phantom", "ventricle:head_mr", "abdomen_ct"])
@pytest.mark.parametrize("size", SIZES)
def test_shipped_configurations_take_another_size(name, size, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    name, colon, variant = name.partition(":")
    config = overrides.load_file(f"configs/{name}.py{colon}{variant}")
    validate(given(f"--config.fewshot.{size}={SIZES[size]}", config=config))
    assert {key: config.fewshot[key] for key in SIZES} == dict.fromkeys(SIZES) | {size: SIZES[size]}
    validate(given("--config.fewshot.rule=all", config=config))
    assert not any(config.fewshot[key] for key in SIZES)


CODE = """
from pgpsam_jax.config import overrides

def get_config():
    config = overrides.load_file("configs/synapse.py")
    {line}
    return config
"""


def test_an_edit_within_the_same_second_counts(tmp_path, monkeypatch):
    """Python takes a file of the same size and second for the one that it has compiled."""
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    path = tmp_path / "mine.py"
    text = "from pgpsam_jax import config\ndef get_config():\n    c = config.default_config()\n"
    for seed in (1, 2):
        path.write_text(f"{text}    c.seed = {seed}\n    return c\n")
        os.utime(path, (1e9, 1e9))
        assert overrides.load_file(str(path)).seed == seed
    assert [file.name for file in tmp_path.iterdir()] == ["mine.py"]  # and leaves nothing there


def test_a_config_file_on_top_of_another(tmp_path, monkeypatch):
    monkeypatch.chdir(REPOSITORY)

    def load(line):
        path = tmp_path / "mine.py"
        path.write_text(CODE.format(line=line))
        config = overrides.load_file(str(path))
        validate(config)
        return config

    assert load("config.fewshot.count = 16").fewshot.fraction is None
    assert load("config.fewshot.update({'rule': 'every', 'every': 4})").fewshot.fraction is None
    assert load("config.fewshot.file = 'x'").fewshot.fraction is None
    with pytest.raises(UserError, match=r"fewshot.count=3 and fewshot.every=2 exclude each other"):
        load("config.fewshot.count = 3; config.fewshot.every = 2")
    with pytest.raises(UserError, match=r"fewshot.rule is 'all', which takes no size, not .*=3"):
        load("config.fewshot.rule = 'all'; config.fewshot.count = 3")
    with pytest.raises(UserError, match=r"a complete list and excludes fewshot.count=3"):
        load("config.fewshot.file = 'x'; config.fewshot.count = 3")
    with pytest.raises(UserError, match=r"mine.py: no such configuration field: speed"):
        load("config.optim.speed = 3")
    with pytest.raises(UserError, match=r"mine.py: division by zero"):
        load("1 / 0")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["fewshot.count=3", "fewshot.fraction=0.5"], "fraction=0.5 and fewshot.count=3 exclude"),
        (["fewshot.rule=area", "fewshot.every=3"], "takes fewshot.fraction or fewshot.count, not"),
        (["fewshot.file=x", "fewshot.seed=3"], "a complete list and excludes fewshot.seed=3"),
        (["fewshot.file=x", "fewshot.rule=area"], "a complete list and excludes fewshot.rule=area"),
        (["fewshot.rule=some"], "fewshot.rule is 'some'; choose from"),
        (["data.window=1,2,3"], "give two numbers"),
        (["data.percentiles=1,2,3"], "give two numbers"),
    ],
)
def test_contradictions_are_refused(flags, message, tmp_path):
    config = given(*(f"--config.{flag}" for flag in flags), config=config_for(tmp_path))
    with pytest.raises(UserError, match=message):
        validate(config)


def test_what_a_split_or_a_layout_leaves_aside(tmp_path):
    config = config_for(tmp_path)
    assert given("--config.data.split=fraction", config=config).data.split_file == ""
    assert given("--config.data.split_file=x", config=config).data.split == "file"
    assert given("--config.data.layout=btcv", config=config).data.image_glob == ""
    config.train.steps = 700
    assert given("--config.train.epochs=3", config=config).train.steps == 0


def test_what_an_earlier_version_stored_is_read():
    stored = to_json(default_config())
    stored["fewshot"] |= {"file": "x", "count": 7, "rule": "area"}  # not used
    stored["data"]["split_file"] = "unused"
    found = from_json(stored)
    assert (found.fewshot.count, found.fewshot.rule, found.data.split_file) == (None, "random", "")
