"""One schema: the command line, the functions, their descriptions and recipe.yaml have the settings of the recipe."""

import inspect
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from door import TOKENS
from hypothesis import given
from hypothesis import strategies as st
from typer.main import get_command

import convexprune
from convexprune import _cli as cli
from convexprune import errors
from convexprune._api import calls
from convexprune._layerwise.allocation import RULES
from convexprune._recipe_file import read_recipe, write_recipe
from convexprune._schema import functions as doors
from convexprune._schema.group import load_yaml
from convexprune._schema.parameters import RECIPE, Parameters, documented
from convexprune._schema.presets import PRESETS
from convexprune._schema.settings import GROUPS
from convexprune.pruners import METHODS
from convexprune.recipe import SOLVERS, Recipe, make_recipe

FUNCTIONS: dict[str, tuple[Any, Parameters[Any]]] = {
    "prune": (convexprune.prune, doors.PRUNE),
    "permute": (convexprune.permute, doors.PERMUTE),
    "compare": (convexprune.compare, doors.COMPARE),
    "verify": (convexprune.verify, doors.VERIFY),
    "inspect": (convexprune.inspect, doors.INSPECT),
    "evaluate": (convexprune.evaluate, doors.EVALUATE),
}
COMMANDS = {name: door for name, (_, door) in FUNCTIONS.items() if name != "evaluate"} | {
    "compare": doors.COMPARE_SAMPLES, "eval": doors.EVALUATE, "bench": doors.BENCH,
}  # fmt: skip


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_function_has_its_settings_with_their_defaults_and_words(name: str):
    function, door = FUNCTIONS[name]
    parameters, words = inspect.signature(function).parameters, " ".join((function.__doc__ or "").split())
    for setting, info in door.fields.items():
        assert parameters[setting].default == info.default
        assert f"{setting}: {info.description}" in words
    assert "{settings}" not in words and not any(p.kind is p.VAR_KEYWORD for p in parameters.values())


@pytest.mark.parametrize("batches", ["1,8", ["1,8"], ["1", "8"], [1, 8], (1, 8)])
def test_batches_and_texts_may_be_a_list_or_a_text(batches: Any):
    assert doors.BENCH.read({"batches": batches})[0].batches == (1, 8)
    for door, name in (doors.COMPARE, "eval_texts"), (doors.EVALUATE, "text"):
        for texts in ("e.txt", Path("e.txt"), ["e.txt"], [Path("e.txt")]):
            assert getattr(door.read({name: texts})[0], name) == ("e.txt",)
        for wrong in None, 3:
            with pytest.raises(errors.RecipeError, match=f"{name}={wrong}: Input should be a valid tuple"):
                door.read({name: wrong})
    for wrong in None, 3, [], "", "1,x":
        with pytest.raises(errors.RecipeError, match="batches"):
            doors.BENCH.read({"batches": wrong})


def test_settings_are_described_where_python_dedents_docstrings():
    """As it does from 3.13 on."""

    def indented(**settings: Any) -> None:
        """Do it.

        Args:
            settings: by name:
            {settings}
        """

    def dedented(**settings: Any) -> None: ...

    dedented.__doc__ = inspect.cleandoc(indented.__doc__ or "")
    first, second = (documented(doors.PRUNE)(function).__doc__ or "" for function in (indented, dedented))
    assert first == second and "\n    sparsity: " in first


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_has_an_option_for_each_setting(name: str):
    command: Any = get_command(cli.app)
    options = {each.name: each for each in command.commands[name].params}
    for setting, info in COMMANDS[name].fields.items():
        if setting in ("tokenizer", "on_progress"):  # objects
            assert setting not in options
        else:
            assert options[setting].default is None
            assert options[setting].param_type_name == "argument" or info.description in options[setting].help


def test_every_setting_is_described_and_belongs_to_one_group():
    names = [name for group in GROUPS for name in group.model_fields]
    assert len(names) == len(set(names)) and set(names) == set(Recipe.model_fields)
    for door in COMMANDS.values():
        assert all(info.description and info.description.endswith(".") for info in door.fields.values())


def test_the_words_name_all_that_can_be_chosen():
    for setting, known in {"method": METHODS, "solver": SOLVERS, "preset": PRESETS, "allocation": RULES}.items():
        assert set(known) <= set(re.findall(r"[\w-]+", RECIPE[setting].description or ""))


def test_a_default_of_its_own_is_not_told_beside_that_of_the_recipe():
    assert "Left out" in (RECIPE["dtype"].description or "") and RECIPE["dtype"].default is None
    assert doors.COMPARE.fields["dtype"].description == "float32, bfloat16 or float16."


@pytest.mark.parametrize("setting", ["threads", "evaluation", "held_out_samples"])
def test_verify_refuses_what_it_would_not_use(setting: str):
    unused: dict[str, Any] = {setting: 2}
    with pytest.raises(errors.RecipeError, match=f"Unknown setting '{setting}'"):
        convexprune.verify(**unused)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_an_unknown_setting_is_one_clear_error_of_every_function(name: str):
    function, _ = FUNCTIONS[name]
    with pytest.raises(errors.RecipeError, match=r"Unknown setting 'dtyp'\. Did you mean 'dtype'\?"):
        function(Path("nowhere"), dtyp="float32")


# ---- recipe.yaml

TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8)
NUMBER = st.floats(0, 1, exclude_max=True)
SETTINGS = st.fixed_dictionaries(
    {"model": TEXT},
    optional={
        "dtype": st.sampled_from([None, "float32", "bfloat16"]),
        "dataset": TEXT,
        "num_calibration_samples": st.integers(1, 10**6),
        "held_out_samples": st.none() | st.integers(0, 10**6),
        "seed": st.integers(0, 2**63 - 1),
        "sparsity": st.none() | NUMBER,
        "quota": st.sampled_from(["matrix", "row"]),
        "targets": st.lists(TEXT, max_size=3).map(tuple),
        "method": st.sampled_from(sorted(METHODS)),
        "damping": st.none() | st.floats(0, 1e9),
        "refit": st.sampled_from([None, True, False]),
        "error_correction": NUMBER,
        "error_target": st.sampled_from(["operator", "residual_stream"]),
        "prefix": st.sampled_from(["dense", "pruned"]),
        "quantizer_args": st.dictionaries(TEXT, st.none() | st.booleans() | st.integers() | NUMBER | TEXT, max_size=3),
        "method_args": st.dictionaries(TEXT, st.none() | st.booleans() | st.integers() | NUMBER | TEXT, max_size=3),
        "evaluation": st.none() | TEXT,
        "threads": st.none() | st.integers(1, 64),
    },
)


@given(settings=SETTINGS)
def test_a_recipe_that_is_written_is_read_as_it_was(settings: dict[str, Any], tmp_path_factory):
    folder = tmp_path_factory.mktemp("recipe")
    recipe = make_recipe(**settings)
    write_recipe(recipe, folder)
    assert read_recipe(folder) == read_recipe(folder / "recipe.yaml") == recipe
    assert make_recipe(**recipe.chosen) == recipe


@pytest.mark.parametrize(
    ("text", "value"),
    [("2:4", "2:4"), ("1:30.5", "1:30.5"), ("0.5", 0.5), ("-3", -3), ("1e-3", 1e-3), (".5", 0.5), ("1.5e+3", 1500.0),
     ("true", True), ("null", None), ("re:.*k_proj", "re:.*k_proj"), (".inf", float("inf")),
     ("1.0e-06", 1e-6), ("5.", 5.0), ("-.5", -0.5), ("12ab", "12ab"), ("1_000", "1_000")],
)  # fmt: skip
def test_plain_yaml_reads_values_as_they_are_written(text: str, value: Any):
    assert load_yaml(f"a: {text}") == {"a": value}


def test_a_recipe_prunes_as_it_did_and_what_is_given_besides_replaces_its_own(build, tmp_path: Path):
    settings: dict[str, Any] = {"dataset": TOKENS, "method": "wanda", "num_calibration_samples": 4, "bound_rows": 0}
    first = convexprune.prune(build("llama"), **settings, sparsity=0.3, output_dir=tmp_path / "out")
    for recipe in (tmp_path / "out", tmp_path / "out" / "recipe.yaml", read_recipe(tmp_path / "out")):
        again = convexprune.prune(build("llama"), recipe=recipe, dataset=TOKENS)
        assert again.report.recipe == first.report.recipe
        assert all(map(torch.equal, again.model.parameters(), first.model.parameters()))
    other = convexprune.prune(build("llama"), recipe=tmp_path / "out", dataset=TOKENS, sparsity=0.5, prefix="pruned")
    assert other.report.sparsity == 0.5 and other.report.recipe["error_correction"] == 0.5  # it follows from the prefix
    with pytest.raises(errors.RecipeError, match=r"The dataset of this recipe was a Tensor given by the caller\. Name"):
        convexprune.prune(build("llama"), recipe=tmp_path / "out")


@pytest.mark.parametrize(
    ("then", "now"), [({"quantize": "int4", "group_size": 32}, {"bits": 3.0}), ({"bits": 3.0}, {"quantize": "int4"})]
)
def test_bits_take_the_place_of_the_grid_of_a_recipe_and_a_grid_that_of_bits(then: dict[str, Any], now: dict[str, Any]):
    recipe = make_recipe(model="a", dataset="b", sparsity=0.0, **then)
    asked = calls._asked(now, recipe)[1]
    assert make_recipe(**asked) == make_recipe(model="a", dataset="b", sparsity=0.0, **now)
    with pytest.raises(errors.RecipeError, match="in place of quantize"):
        make_recipe(**{**asked, **then, **now}).build_pattern()


MIXED = {"quantize": "compressed-tensors"}


@pytest.mark.parametrize(
    ("then", "beside", "now"),
    [
        ({"target": "2MB"}, {"quantize": "int4"}, {"quantize": "int4", "sparsity": 0.0}),
        ({"quantize": "gguf", "bits": 9.0}, {"bits": 5.0}, {"quantize": "gguf", "bits": 5.0}),
        (
            {"quantize": "compressed-tensors", "bits": 9.0},
            {"target": "2MB"},
            {"quantize": "compressed-tensors", "target": "2MB"},
        ),
        ({"target": "2MB"}, {"quantize": "compressed-tensors"}, {"quantize": "compressed-tensors", "target": "2MB"}),
        ({"bits": 3.0, "sparsity": 0.0}, {"target": "2MB"}, {"target": "2MB"}),
        ({"target": "2MB"}, {"pattern": "2:4", "quantize": "int4"}, {"pattern": "2:4", "quantize": "int4"}),
    ],
)
def test_a_recipe_of_one_size_keeps_its_layout_and_its_zeros(then: dict[str, Any], beside: dict[str, Any], now: Any):
    recipe = make_recipe(model="a", dataset="b", **then)
    assert make_recipe(**calls._asked(beside, recipe)[1]) == make_recipe(model="a", dataset="b", **now)


@pytest.mark.parametrize("preset", ["fast", "best", "balanced"])
def test_a_preset_beside_the_recipe_of_a_run_counts(preset: str, tmp_path: Path):
    """A folder's recipe names all settings, those with their default, too."""
    write_recipe(make_recipe(model="a", dataset="b", seed=3), tmp_path)
    asked = calls._asked({"preset": preset, "sparsity": 0.6}, tmp_path)[1]
    assert make_recipe(**asked) == make_recipe(model="a", dataset="b", seed=3, sparsity=0.6, preset=preset)


def test_a_result_is_not_written_into_the_folder_of_the_model_that_a_recipe_names(dense: Path):
    recipe = make_recipe(model=str(dense), method="magnitude")
    with pytest.raises(errors.OutputError, match="lies inside of the model's own folder"):
        convexprune.prune(recipe=recipe, dataset=TOKENS % 500, output_dir=dense / "out")


def test_what_is_no_recipe_or_no_path_is_refused():
    with pytest.raises(errors.OutputError, match=r"^gone\.yaml: there is no such file"):
        convexprune.prune(recipe="gone.yaml")
    for wrong in (5, {"model": "a"}):
        with pytest.raises(errors.RecipeError, match="Accepted: a Recipe, its file, or the folder of a run"):
            convexprune.prune(recipe=wrong)  # pyright: ignore[reportArgumentType]
    with pytest.raises(errors.ModelError, match="A value of type NoneType is no folder"):
        convexprune.load(None)  # pyright: ignore[reportArgumentType]


def test_a_recipe_trusts_no_code(tmp_path: Path):
    (tmp_path / "recipe.yaml").write_text("model: a\ntrust_remote_code: true\n")
    with pytest.raises(errors.RecipeError, match="Unknown setting 'trust_remote_code'"):
        convexprune.prune(recipe=tmp_path)
