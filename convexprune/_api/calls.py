"""The public functions `prune`, `plan`, `permute` and `export`."""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from convexprune import adapters
from convexprune._api.given import name_of, name_of_text, write_copies
from convexprune._api.pruning import InFolder, InMemory
from convexprune._api.result import PermuteResult, PruneResult, check_hub, held
from convexprune._container.layouts import LAYOUTS, imported
from convexprune._device.machine import default_device
from convexprune._device.memory import within_memory
from convexprune._device.switches import pinned
from convexprune._progress import OnProgress, begin
from convexprune._progress.shown import visible
from convexprune._recipe_file import GIVEN, read_recipe
from convexprune._rendering.card import write_card
from convexprune._runs.executors import check_patterns
from convexprune._runs.folder import RunFolder
from convexprune._schema.functions import PERMUTE, PRUNE, Call
from convexprune._schema.parameters import UNSET, documented
from convexprune._schema.presets import intended
from convexprune._storage.failures import working
from convexprune._storage.files import named
from convexprune._storage.staging import Staging
from convexprune.adapters import HuggingFaceModel, Inspection, load
from convexprune.constraints import FAMILIES
from convexprune.errors import PatternError, RecipeError, unknown
from convexprune.recipe import Recipe, make_recipe
from convexprune.solvers import AbstractSolver

EXCLUDES = {
    "bits": ("quantize", "group_size", "target"),
    "quantize": ("bits", "target"),
    "target": ("bits", "quantize"),
}
"""Settings of a recipe that make room for one that is given beside it, because both together mean nothing."""
SIZES = {"bits": ("target",), "target": ("bits",)}
"""The same for files of one size, where `quantize` is the layout."""


@visible
@pinned()
@documented(PRUNE)
def prune(
    model: str | Path | PreTrainedModel | None = None,
    solver: str | AbstractSolver = UNSET,
    method: str = UNSET,
    sparsity: float | None = UNSET,
    pattern: str = UNSET,
    *,
    recipe: Recipe | str | Path | None = None,
    dataset: Any = UNSET,
    evaluation: str | Path | Tensor | None = UNSET,
    device: str | torch.device = UNSET,
    output_dir: str | Path | None = None,
    resume: bool = UNSET,
    on_progress: OnProgress | None = None,
    **settings: Any,
) -> PruneResult:
    """Prune a language model; the report has the certificate of every operator's convex solve.

    A loaded model moves to `device` and `dtype` and is changed in place: it keeps its modes (train, eval) and
    `requires_grad`, and is pruned and cast only if the run succeeds. Meanwhile a copy of its decoder layers, and of all
    that is cast, is in the memory of the CPU. A data set may also be a list of texts, or token ids: tensors, arrays,
    lists, or an iterable (a DataLoader); a text to evaluate on may be token windows [windows window]; a solver may be
    an `AbstractSolver` of the user. With `output_dir` the model is never whole in memory, if its checkpoint allows
    streaming (docs/runs.md); the run can be interrupted, and `recipe.yaml` and `report.json` lie beside the result.

    Args:
        recipe: a `Recipe`, its file, or the folder of a run. Settings beside the recipe replace the recipe's, and
            dependent defaults, such as the allocation of a pattern, follow anew.
        settings: by name:
        {settings}

    Returns:
        The result: its report, and the pruned model on request.

    Raises:
        ConvexpruneError: see `convexprune.errors`; bad input is refused before any work.
    """
    given = {name: value for name, value in locals().items() if name not in ("recipe", "settings")} | settings
    call, asked = _asked(given, recipe)
    if call.push_to_hub is not None:
        check_hub(call.push_to_hub)
    with within_memory(), nullcontext() if call.output_dir is None else working(call.output_dir):
        request = InMemory(asked, call) if call.output_dir is None else InFolder(asked, call)
        with within_memory(request.what_needs_less):
            result = request.run()
    write_copies(result.report, call)
    if call.push_to_hub is not None and not request.executor.rank:
        result.push_to_hub(call.push_to_hub, private=call.private)
    return result


@pinned()
def plan(*, recipe: Recipe | str | Path | None = None, **settings: Any) -> Inspection:
    """Predict the work of `prune` after all of its checks. Nothing is computed or written."""
    call, asked = _asked(settings, recipe)
    if call.output_dir is None:
        raise RecipeError("A plan is that of a run in a folder. Give output_dir.")
    with within_memory():
        return InFolder(asked, call).plan()


def _asked(given: dict[str, Any], recipe: Recipe | str | Path | None) -> tuple[Call, dict[str, Any]]:
    """Return the call and the recipe's settings, those of a recipe beside the given ones."""
    given = {name: value for name, value in given.items() if not (name == "model" and value is None)}
    if recipe is not None:
        given = {name: value for name, value in given.items() if value is not UNSET}
        if not isinstance(recipe, Recipe | str | Path):
            raise RecipeError(
                f"recipe is of type {type(recipe).__name__}. Accepted: a Recipe, its file, or the folder of a run."
            )
        read = recipe if isinstance(recipe, Recipe) else read_recipe(Path(recipe).expanduser())
        excludes = SIZES if (given.get("quantize") or read.quantize) in FAMILIES else EXCLUDES
        gone = {other for name, others in excludes.items() if given.get(name) is not None for other in others}
        if "preset" in given:  # a folder's recipe names all settings, and the preset replaces its own
            gone |= intended(read.chosen | given).keys()
        zeros = {} if read.sparsity is None or "pattern" in given else {"sparsity": read.sparsity}
        given = zeros | {name: value for name, value in read.chosen.items() if name not in gone} | given
    call, asked = PRUNE.read(given)
    for name in ("model", "dataset", "evaluation"):
        if isinstance(text := asked.get(name), str) and text.endswith(GIVEN):
            raise RecipeError(f"The {name} of this recipe was a {text}. Name one: {name}=... (--{name}).")
    return call, adapters.bundled_if_none(asked)


@visible
@pinned()
@documented(PERMUTE)
def permute(
    model: str | Path | PreTrainedModel | None = None,
    pattern: str = UNSET,
    *,
    dataset: Any = UNSET,
    on_progress: OnProgress | None = None,
    **settings: Any,
) -> PermuteResult:
    """Order the channels of a dense model so that an N:M pattern prunes less; the function stays the same.

    An N:M pattern depends on the order of inputs. Channels inside an MLP, inside an attention head, and of the hidden
    states may change places without a change of the function, if writing rows and reading columns move alike (Pool &
    Yu, NeurIPS 2021). Experiments on the model find such sets, and the result is tried. Prune the permuted model as
    usual. Adapters (LoRA) trained on the former order do not fit. A loaded model is changed in place; with `output_dir`
    the model is never whole in memory, if its checkpoint allows streaming, and `permutation.json` holds every order.

    Args:
        settings: by name:
        {settings}

    Returns:
        The order, the permuted model (of a loaded model the model itself), and the folder.

    Raises:
        ConvexpruneError: see `convexprune.errors`; bad input is refused before any work.
    """
    given = {"model": model, "pattern": pattern, "dataset": dataset, "on_progress": on_progress}
    call, asked = PERMUTE.read(given | settings)
    asked = adapters.bundled_if_none(asked)
    source: Any = asked["model"]
    dataset = asked.get("dataset", "self")
    names = {"model": name_of(source), "dataset": name_of_text(dataset), "pattern": call.pattern}
    recipe = make_recipe(**asked | names, held_out_samples=0)
    order_of = recipe.build_pattern()
    if order_of.block == 1:
        raise PatternError(f"Pattern {call.pattern!r} does not see the order of channels. Accepted: 'N:M', '2:4' say.")
    place = default_device(recipe.device)
    adapters.check_dataset(dataset)
    folder = None if call.output_dir is None else Staging.of_new(call.output_dir, source).output
    opened = partial(
        load,
        device=place,
        dtype=recipe.torch_dtype,
        tokenizer=adapters.given_tokenizer(call.tokenizer),
        trust_remote_code=call.trust_remote_code,
        allow_pickle=call.allow_pickle,
        allow_changed=call.allow_changed,
    )

    begin("loading the model")
    with adapters.cast_back(source, recipe.torch_dtype), opened(source, stream=folder is not None).lent() as loaded:
        adapters.refuse_headless(loaded.model, {"permute": ""})
        check_patterns(loaded.layers, recipe.layer_settings())  # what `prune` refuses afterwards
        # To sample text a model has to be whole.
        sampler = opened(source) if loaded.streams and adapters.needs_sampling(dataset) else loaded
        tokens, _ = adapters.recipe_windows(dataset, sampler, recipe)
        del sampler
        found = adapters.find_permutation(loaded, tokens, order_of, recipe.batch_size, recipe.seed)
        if folder is None:
            found.apply(loaded.model)
        else:
            adapters.save_permuted(loaded, found, folder)
        changed = partial(_read, opened, folder or source) if loaded.streams else held(loaded.model)
        return PermuteResult(permutation=found, output_dir=folder, _model=changed)


def _read(opened: Callable[..., HuggingFaceModel], source: Any) -> PreTrainedModel:
    with opened(source).lent() as permuted:
        return permuted.model


@visible
def export(
    source: str | Path, output: str | Path, format: str = "compressed-tensors", *, allow_changed: bool = False
) -> Path:
    """Write the result of a run as other engines load it.

    Args:
        source: the folder of a run. For GGUF any folder of a model will do; what is not quantized keeps its type.
        output: where to write to; must be empty or not there. It is there whole or not at all.
        format: "compressed-tensors", a folder for vLLM and transformers, of a run with `quantize` int8 to int3. "gguf",
            a file for llama.cpp, Ollama and LM Studio.
        allow_changed: take a result whose files are not those that the run wrote.

    Returns:
        The output.

    Raises:
        RecipeError: there is no such format.
        DependencyError: the format needs a package that is not there.
        ModelError: the format cannot say what the folder holds.
        OutputError: the output holds something, or the disk is full.
    """
    if format not in LAYOUTS:
        raise RecipeError(unknown("format", format, LAYOUTS))

    def add_card(folder: Path) -> None:
        write_card(replace(RunFolder(named(source)).report(), packed=None), folder, layout=format)

    return imported(format).export(source, output, allow_changed, add_card)
