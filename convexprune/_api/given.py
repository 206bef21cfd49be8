"""The things that a call of `prune` is given: texts and their windows, executor, place of copies; and warnings."""

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from filecmp import cmp
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import CONFIG_NAME

from convexprune import adapters
from convexprune._container.layouts import imported
from convexprune._device.kernels import eager_because
from convexprune._device.machine import default_workers
from convexprune._layerwise.processes import require_rendezvous
from convexprune._recipe_file import RECIPE, given, write_recipe
from convexprune._runs.executors import AbstractExecutor, make_executor
from convexprune._runs.folder import REPORT
from convexprune._schema.functions import Call
from convexprune._storage.files import write_text
from convexprune._storage.staging import output_folder
from convexprune.adapters import HuggingFaceModel
from convexprune.constraints import Block, Grid
from convexprune.errors import CalibrationError, DependencyError, ModelError, OutputError, RecipeError
from convexprune.recipe import Recipe, make_recipe
from convexprune.report import Report
from convexprune.solvers import AbstractSolver, solver_names

Windows = Mapping[str, Tensor]  # token ids [windows window] by what they are for
OF_DATASET = ("calibration", "held_out")
HELD_OUT = "held-out"  # the text to evaluate on that is the data set's own
EVALUATION_SAMPLES = 32  # of text that the model samples itself


@dataclass(frozen=True, eq=False)
class Sources:
    dataset: Any
    evaluation: Any  # as the caller gave it; None without an evaluation

    def check(self) -> None:
        """Refuse, before any work, names and paths that lead nowhere, and data without a perplexity."""
        adapters.check_dataset(self.dataset)
        text = self.evaluation
        if isinstance(text, str | Path) and text not in ("self", HELD_OUT):
            adapters.read_documents(text)
        elif not (text is None or isinstance(text, str | Tensor)):
            raise CalibrationError(
                f"evaluation is of type {type(text).__name__}. Accepted: 'held-out', 'self', a path to a .txt or "
                ".jsonl file, or token ids as a tensor [windows window]."
            )

    def sampled(self, windows: Windows) -> dict[str, Tensor]:
        """Return the part of the `windows` that the model writes."""
        return {name: tokens for name, tokens in windows.items() if adapters.needs_sampling(self._by_use[name])}

    @property
    def has_sampled(self) -> bool:
        return any(map(adapters.needs_sampling, self._by_use.values()))

    def draw(
        self, model: HuggingFaceModel, recipe: Recipe, known: Windows, whole: Callable[[], HuggingFaceModel]
    ) -> Windows:
        """Return the windows of token ids for a run; to sample text a streamed model is opened whole, and released."""
        windows = self.sampled(known)
        to_sample = [name for name, text in self._by_use.items() if adapters.needs_sampling(text)]
        is_given = isinstance(self.evaluation, Tensor) or self.evaluation not in (None, "self", HELD_OUT)
        if adapters.needs_sampling(self.dataset) and is_given:
            # Before the model writes its own text, which takes long: this one may be too short.
            length = adapters.window_length(model, recipe.max_seq_length)
            windows["evaluation"] = self._to_evaluate(model, length, recipe)
        sampler = whole() if model.streams and not windows.keys() >= set(to_sample) else model
        if "calibration" not in windows:
            windows["calibration"], windows["held_out"] = adapters.recipe_windows(self.dataset, sampler, recipe)
        if isinstance(self.evaluation, str) and self.evaluation == HELD_OUT:
            if not len(windows["held_out"]):
                raise CalibrationError(
                    f"evaluation={HELD_OUT!r}: no sample is held out. Give more text, held_out_samples, or another "
                    "text to evaluate on (--evaluation FILE)."
                )
            windows["evaluation"] = windows["held_out"]
        if self.evaluation is not None and "evaluation" not in windows:
            windows["evaluation"] = self._to_evaluate(sampler, windows["calibration"].shape[1], recipe)
        if "evaluation" in windows:
            windows["evaluation"] = adapters.to_predict(windows["evaluation"], model.model, model.name)
        return windows

    def _to_evaluate(self, model: HuggingFaceModel, window: int, recipe: Recipe) -> Tensor:
        if isinstance(self.evaluation, Tensor):
            return self.evaluation
        if self.evaluation == "self":
            settings = {"num_samples": EVALUATION_SAMPLES, "max_seq_length": window, "seed": recipe.seed}
            return adapters.calibration_and_held_out("self", model, split="evaluation", **settings)[0]
        return adapters.text_windows(Path(self.evaluation), model, window)

    @property
    def _by_use(self) -> dict[str, Any]:
        return dict.fromkeys(OF_DATASET, self.dataset) | {"evaluation": self.evaluation}


def name_of_text(text: Any) -> str:
    """Return the name of a data set or a text for the recipe: a full path, a name, or a description."""
    if not isinstance(text, str | Path):
        return given(text)
    if len(parts := adapters.parts_of(text)) > 1:
        return ",".join(f"{name_of_text(name)}:{share:g}" for name, share in parts)
    name, column, _ = adapters.addressed(parts[0][0])
    path = Path(name).expanduser()
    whole = path.suffix in adapters.TEXT_FILES and path.is_file()
    return f"{path.absolute()}{'' if column is None else f'#{column}'}" if whole else str(parts[0][0])


def executor_for(call: Call, recipe: Recipe, source: Any, device: str) -> AbstractExecutor:
    name, workers = call.executor, call.workers
    if workers is not None and name in ("serial", "ranks"):
        why = "prunes in this process" if name == "serial" else "has as many as the launcher started"
        raise RecipeError(f"workers={workers}: executor={name!r} {why}. Leave it out, or take 'pool' or 'ray'.")
    if call.overwrite and name == "ranks":
        raise RecipeError("overwrite=True with executor='ranks': one process replaces a folder. Remove it yourself.")
    if name != "serial" and call.output_dir is None:
        raise RecipeError(f"executor={name!r}: the workers meet in the output folder. Give output_dir.")
    if name in ("pool", "ray") and recipe.prefix == "pruned":
        instead = "" if recipe.build_pattern().compensates else "; or use prefix='dense'"
        raise RecipeError(
            f"executor={name!r} with prefix='pruned': each layer waits for the one before it to be pruned, so layers "
            "cannot be spread. executor='ranks', started by torchrun, spreads the samples of each layer, and "
            f"executor='serial' over threads{instead}."
        )
    if name in ("pool", "ray") and isinstance(source, PreTrainedModel):
        raise RecipeError(f"executor={name!r}: the workers cannot open a model that is loaded. Give its folder.")
    return make_executor(name, workers or default_workers(device, recipe.threads), device)


def team_size(recipe: Recipe, executor: AbstractExecutor) -> int:
    """Return the number of ranks that prune a layer together; 1 if a layer has a single process."""
    if recipe.prefix == "dense" or executor.together == 1:
        return 1
    require_rendezvous()
    batches = -(-recipe.num_calibration_samples // recipe.batch_size)
    if batches < executor.together:
        raise RecipeError(
            f"{executor.together} ranks share {batches} batches of calibration samples, and one would have none. Give "
            "more samples, smaller batches (batch_size), or fewer ranks."
        )
    return executor.together


TOO_FEW = 8192  # tokens for columns to be chosen by: with a quarter of them SmolLM2 is 8 % worse (lab/tried.md)
ORACLES, FEW = ("cvxpy", "scipy"), 32  # solvers that are exact and slow, and the inputs up to which they are quick


def run_warnings(model: HuggingFaceModel, windows: Windows, recipe: Recipe) -> Iterator[str]:
    shapes = [operator.shape for layer in model.layers for operator in layer.operators]
    widest, fewest = max(inputs for _, inputs in shapes), min(outputs for outputs, _ in shapes)
    few = adapters.shortage(windows["calibration"], widest)
    shared = adapters.shared_weights(model.left_alone, model.layers)
    removes = recipe.build_pattern().removes is not None  # then what is left is of no matter
    unknown = None if removes else adapters.unknown_maps(model.left_alone, model.model, model.layers)
    yield from (warning for warning in (few, shared, unknown, eager_because(model.device)) if warning is not None)
    if recipe.method == "convex" and recipe.solver in ORACLES and widest > FEW:
        yield (
            f"solver={recipe.solver!r} solves row by row, 60 problems a row: minutes for an operator of {FEW} inputs, "
            f"and this model has up to {widest}. It is slow, and there to check others (convexprune verify)."
        )
    if (others := recipe.deviations) is not None:
        yield others
    if (refusal := _refused_export(model, recipe)) is not None:
        yield refusal
    tokens = windows["calibration"].numel()
    if recipe.allocation == "columns" and tokens < TOO_FEW:
        yield (
            f"Columns are chosen by the loss on {tokens:,} tokens. On fewer than {TOO_FEW:,} the choice is worse "
            "(docs/channels.md). Give more samples, or compare allocation='uniform', which needs no gradients."
        )
    if recipe.bound_rows > fewest:
        yield f"bound_rows={recipe.bound_rows}: all rows are bounded of operators with fewer outputs ({fewest})."


def _refused_export(model: HuggingFaceModel, recipe: Recipe) -> str | None:
    """Return what `export` will say of the codes of a model that no engine's files can hold."""
    grid, settings = recipe.build_pattern().grid, model.model.config.to_dict()
    try:
        if isinstance(grid, Block):
            named = {"architectures": [type(model.model).__name__]}
            imported("gguf").GGUFModel(settings | named, Path(model.folder or "This model"))
        elif isinstance(grid, Grid):
            adapters.require_exportable(model.folder, model.layers, adapters.ends(model), dict(model.left_alone))
    except DependencyError as error:
        return f"Whether `convexprune export` will take the result is not known yet. {error}"
    except ModelError as error:
        return f"{error} So `convexprune export` will refuse the result; `convexprune pack` takes it."
    return None


def check_copies(call: Call) -> None:
    """Refuse, before any work, a folder in which copies would replace anything but the copies of the same run."""
    if (folder := _copies(call)) is None:
        return
    if os.path.lexists(folder / CONFIG_NAME):
        raise OutputError(
            f"{folder} holds a model, which the report of another run would damage. Give another report_dir (--save)."
        )
    there = [name for name in (REPORT, RECIPE) if os.path.lexists(folder / name)]
    run = None if call.output_dir is None else call.output_dir.expanduser()
    if run is not None and folder.resolve().is_relative_to(run.resolve()):
        raise OutputError(
            f"{folder} lies inside of the result's folder, {run}, which then holds what is not the run's. Give another "
            "report_dir (--save)."
        )
    replaced = run if call.resume or call.overwrite else None
    foreign = [name for name in there if replaced is None or not _is_copy(folder / name, replaced / name)]
    if foreign:
        raise OutputError(f"{folder} already holds {' and '.join(foreign)}. Give another report_dir (--save).")


def write_copies(report: Report, call: Call) -> None:
    if (folder := _copies(call)) is not None:
        write_text(folder / REPORT, report.to_json())
        write_recipe(make_recipe(**report.recipe), folder)


def _copies(call: Call) -> Path | None:
    """Return the folder for copies of report and recipe, unless it is the result's."""
    if call.report_dir is None:
        return None
    if call.output_dir is not None and len({f.expanduser().resolve() for f in (call.report_dir, call.output_dir)}) == 1:
        return None
    return output_folder(call.report_dir, is_staged=False)


def _is_copy(path: Path, original: Path) -> bool:
    return path.is_file() and not path.is_symlink() and original.is_file() and cmp(path, original, shallow=False)


def require_read(recipe: Recipe) -> None:
    """Refuse settings of a quantization without a quantization: nothing would read the settings."""
    for name, readers in {
        "group_size": ("quantize", "embedding"),
        "quantizer": ("quantize", "bits", "embedding"),
        "quantizer_args": ("quantize", "bits", "embedding"),
    }.items():
        given, read = getattr(recipe, name), any(getattr(recipe, reader) is not None for reader in readers)
        if not read and given != Recipe.model_fields[name].default:
            raise RecipeError(
                f"{name}={given!r} belongs to {' or '.join(readers)} (quantize='int4', say), which is not given, and "
                "nothing else reads it. Leave it out."
            )


def require_solver(solver: Any) -> AbstractSolver:
    if isinstance(solver, AbstractSolver):
        return solver
    found = f"the class {solver.__name__}" if isinstance(solver, type) else f"a value of type {type(solver).__name__}"
    raise RecipeError(
        f"solver is {found}. Accepted: {', '.join(solver_names())}, or an object of a class of your own that derives "
        "from convexprune.AbstractSolver."
    )


def name_of(source: Any) -> str:
    """Return the name of a model for its recipe: the bundled one, a full path, a name on the hub, or a description."""
    text = source.name_or_path if isinstance(source, PreTrainedModel) else source
    if not isinstance(text, str | Path) or not text:  # a compiled model has no truth value
        return given(source)
    path = Path(text).expanduser()
    return adapters.BUNDLED if path == adapters.EMBEDDED else str(path.absolute()) if path.exists() else str(text)
