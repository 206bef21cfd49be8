"""The common part of all calls of `prune`: checks, model, tokens, report."""

import logging
import platform
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from convexprune import adapters
from convexprune._api.given import (
    Sources,
    Windows,
    check_copies,
    executor_for,
    name_of,
    name_of_text,
    require_read,
    require_solver,
    run_warnings,
    team_size,
)  # fmt: skip
from convexprune._container.layouts import Size, imported
from convexprune._device import machine
from convexprune._device.machine import installation
from convexprune._device.memory import use_gpu
from convexprune._layerwise.allocation import WEIGHED
from convexprune._layerwise.settings import TokenWeighting
from convexprune._layerwise.store import AbstractStore
from convexprune._layerwise.work import Work
from convexprune._progress import FORECAST, begin
from convexprune._runs.executors import check_patterns
from convexprune._schema.functions import Call
from convexprune.adapters import AbstractRemoval, HuggingFaceModel, load, what_needs_less
from convexprune.constraints import FAMILIES, Codebook
from convexprune.errors import ModelError, PatternError, RecipeError
from convexprune.recipe import make_recipe
from convexprune.report import OnOperator, OperatorReport, Report
from convexprune.validation._perplexity import fit

logger = logging.getLogger(__name__)


class Request:
    """A checked call of `prune`: recipe, executor, and the way to open the model; a subclass runs the request."""

    def __init__(self, settings: dict[str, Any], call: Call) -> None:
        self.source, solver = settings["model"], settings.get("solver")
        own = None if solver is None or isinstance(solver, str) else require_solver(solver)
        texts = {name: settings[name] for name in ("dataset", "evaluation") if name in settings}
        named = [name for name, text in texts.items() if name == "dataset" or text is not None]
        names: dict[str, Any] = {name: name_of_text(texts[name]) for name in named}
        names |= {"model": name_of(self.source)} | ({} if own is None else {"solver": type(own).__name__})
        self.recipe = recipe = make_recipe(**settings | names)
        require_read(recipe)
        self.layers = recipe.layer_settings(recipe.build_pruner(own), bound_rows=recipe.bound_rows)
        self.sources = Sources(texts.get("dataset", recipe.dataset), texts.get("evaluation"))
        self.device = machine.default_device(recipe.device)
        machine.check_threads(recipe.threads)
        self.sources.check()
        check_copies(call)
        self.call = call
        self.executor = executor_for(call, recipe, self.source, self.device)
        self.team_size = team_size(recipe, self.executor)
        if self.executor.rank is not None and self.device == "cuda":
            self.device = f"cuda:{self.executor.rank % torch.cuda.device_count()}"
        use_gpu(self.device)
        self.threads = recipe.threads or max(1, torch.get_num_threads() // self.executor.processes)
        self.given_tokenizer = adapters.given_tokenizer(call.tokenizer)
        self.installed = installation(self.device)
        self.cast_back = partial(adapters.cast_back, self.source, recipe.torch_dtype)
        self.what_needs_less = partial(what_needs_less, self.source, recipe, call.trust_remote_code)
        self.open = partial(
            load,
            self.source,
            dtype=recipe.torch_dtype,
            tokenizer=self.given_tokenizer,
            trust_remote_code=call.trust_remote_code,
            allow_pickle=call.allow_pickle,
            allow_changed=call.allow_changed,
            targets=recipe.targets,
            ignore=recipe.ignore,
        )
        if recipe.build_pattern().removes and isinstance(self.source, PreTrainedModel):
            raise ModelError(
                f"Pattern {recipe.pattern!r} makes a smaller model, and a loaded one is pruned in place. Save it "
                "(save_pretrained), and give its folder."
            )
        self.size: Size | None = None  # of the exported file, if types are chosen for it, and the bytes it may have
        self.target = 0
        self.removal: AbstractRemoval | None = None
        self.clock = machine.Clock()
        self.dense_states: list[Tensor] | None = None

    def _check(self, loaded: HuggingFaceModel) -> None:
        pattern = self.recipe.build_pattern()
        if pattern.removes:
            begin(f"looking for {pattern.removes}")
            self.removal = adapters.find_removal(loaded, pattern)
            self.open = partial(self.open, targets=self.removal.choose(loaded))
            self.layers = replace(self.layers, patterns=self.removal.patterns)
        self.layers = adapters.with_rules(self.layers, self.recipe, loaded.layers)
        check_patterns(loaded.layers, self.layers)
        if self.recipe.embedding_grid is not None:
            self._check_ends(loaded, self.recipe.embedding_grid)
        if self.recipe.quantize in FAMILIES:
            self._measure(loaded, self.recipe.quantize)
        weighting = TokenWeighting.parse(self.recipe.token_weights)
        needs = {
            f"allocation={self.recipe.allocation!r}": (self.recipe.allocation in WEIGHED, "take allocation='uniform'"),
            "token_weights='loss'": (weighting.kind == "loss", "take another"),
            'dataset="self"': (adapters.needs_sampling(self.sources.dataset), "another data set"),
            "the perplexity": (self.sources.evaluation is not None, "leave evaluation out"),
        }
        adapters.refuse_headless(loaded.model, {what: instead for what, (needed, instead) in needs.items() if needed})

    def _check_ends(self, loaded: HuggingFaceModel, grid: Codebook) -> None:
        if self.call.output_dir is None:
            raise RecipeError(f"embedding={self.recipe.embedding!r} is written to a folder. Give output_dir.")
        adapters.refuse_headless(loaded.model, {"embedding": "leave it out"})
        for name in adapters.ends(loaded):
            try:
                grid.check(*loaded.model.get_parameter(f"{name}.weight").shape)
            except PatternError as error:
                raise PatternError(f"embedding={self.recipe.embedding!r}, {name}: {error}") from error

    def _measure(self, loaded: HuggingFaceModel, layout: str) -> None:
        """Find the size of the file by types, and refuse targets that no types meet."""
        given = isinstance(self.source, PreTrainedModel) or self.given_tokenizer is not None
        if given or loaded.folder is None or self.call.output_dir is None:
            raise RecipeError(
                f"quantize={layout!r} counts the bytes of a file. It takes the folder of a model with its tokenizer, "
                "no loaded one, and needs output_dir."
            )
        measure = imported(layout).measure
        self.size = size = measure(
            loaded.folder, adapters.alike(loaded.layers), adapters.ends(loaded), loaded.model.dtype
        )
        self.target = self.recipe.target or int(size.weights * (self.recipe.bits or 0.0) / 8)
        size.require(self.target)

    def _quantize_ends(
        self, loaded: HuggingFaceModel, windows: Windows, report: Report, store: AbstractStore, grid: Codebook
    ) -> None:
        """Put embedding and head on a grid."""
        report.ends = dict.fromkeys(adapters.ends(loaded), str(grid))
        choice = adapters.TypeChoice(
            loaded, windows["calibration"], self.recipe.batch_size, [*report.ends], self.layers.quantizer
        )
        choice.tensors(store, report.ends)
        self._tell_ends(report, windows)
        self.clock.lap("embedding and head")

    def _tell_ends(self, report: Report, windows: Windows) -> None:
        names = [*report.ends] if self.size is None else self.size.ends
        for name in names:
            report.left_alone.pop(name, None)
        if "evaluation" in windows and names:
            end = "the perplexity here is with embedding and head as they were. For that of all: convexprune eval"
            self._warn(
                report,
                f"{' and '.join(names)} {'are' if names[1:] else 'is'} quantized too, and {end} {self.call.output_dir}",
            )

    def _choose_types(self, loaded: HuggingFaceModel, windows: Windows, report: Report, store: AbstractStore) -> None:
        """Choose the type of every operator, and of embedding and head, which are quantized now."""
        size, recipe = self.size, self.recipe
        assert size is not None
        room, pattern = self.target - size.fixed, recipe.build_pattern()
        choice = adapters.TypeChoice(
            loaded, windows["calibration"], recipe.batch_size, size.ends, self.layers.quantizer, recipe.allocation
        )
        found = store.compute_once("types", lambda: choice.types(store, pattern, size.units, room))
        choice.tensors(store, found["types"])
        begin(f"{FORECAST}{found['cost']:.2g} nats a token for these types; forecasts tell an order, not a size")
        patterns = {name: adapters.on_grid(kind) for name, kind in found["types"].items() if name not in size.ends}
        self.layers = replace(self.layers, patterns=patterns)
        report.allocation = {"cost": found["cost"], "gap": found["gap"]}
        report.sized = size.record(found["types"], self.target)
        self._tell_ends(report, windows)

    def _choose(self, loaded: HuggingFaceModel, windows: Windows, report: Report, store: AbstractStore) -> None:
        """Choose the removed layers or experts before pruning, once for all processes."""
        removal, kind = self.removal, self.layers.pattern.removes
        if removal is None or kind is None or not removal.chosen_first:
            return
        score = self.layers.pruner.scores[kind]
        judging = windows["held_out"] if len(windows["held_out"]) else windows["calibration"]

        def choose() -> Any:
            with store.scratch(0) as record:
                return removal.choose_by(score, loaded, judging, record)

        self.removal = chosen = removal.without(store.compute_once("removed", choose))
        self.open = partial(self.open, targets=chosen.choose(loaded))
        chosen.stand_in(loaded)
        self.layers = replace(self.layers, emptied=chosen.emptied)
        report.left_alone = dict(loaded.left_alone)
        self.clock.lap("choosing what to remove")

    def _allocate(self, loaded: HuggingFaceModel, windows: Windows, report: Report, store: AbstractStore) -> None:
        """Spread the zeros by the recipe, or as at the beginning of the run in the store."""
        if (grid := self.recipe.embedding_grid) is not None:
            self._quantize_ends(loaded, windows, report, store, grid)
        if self.size is not None:
            self._choose_types(loaded, windows, report, store)
            self.clock.lap("types")
        elif self.recipe.allocation != "uniform":
            asked = self.recipe.allocation, self.layers
            found = adapters.allocate(
                loaded, windows["calibration"], windows["held_out"], asked, self.recipe.batch_size, store
            )
            self.layers = found.apply_to(self.layers, self.recipe.build_pattern())
            check_patterns(loaded.layers, self.layers)
            report.allocation = {"cost": found.cost, "gap": found.gap}
            self.clock.lap("allocation")
        weighting = TokenWeighting.parse(self.recipe.token_weights)
        weights = adapters.token_weights(loaded, weighting, windows["calibration"], self.recipe.batch_size, store)
        self.layers = replace(self.layers, token_weights=weights)
        self.clock.lap("token weights")

    def _work(self, windows: Windows) -> Work:
        return Work(windows["calibration"], windows["held_out"], self.recipe.batch_size, self.layers)

    def _windows(self, loaded: HuggingFaceModel, known: Windows) -> Windows:
        windows = self.sources.draw(loaded, self.recipe, known, lambda: self.open(device=self.device))
        self.clock.lap("calibration data")
        return windows

    def _report(self, loaded: HuggingFaceModel, windows: Windows) -> Report:
        environment = _environment(loaded) | {"threads": self.threads}
        report = Report(self.recipe.model_dump(mode="json"), dict(loaded.left_alone), environment)
        report.base = adapters.said_of_base(loaded.folder)
        for warning in run_warnings(loaded, windows, self.recipe):
            self._warn(report, warning)
        return report

    def _warn(self, report: Report, warning: str | None) -> None:
        """Tell the user, once, and the report."""
        if warning is not None:
            report.warnings.append(warning)
            if not self.executor.rank:
                logger.warning(warning)

    def _on_operator(self, loaded: HuggingFaceModel, earlier: Sequence[OperatorReport] = ()) -> OnOperator:
        """Begin the pruning, and tell of the operators that an earlier call has pruned."""
        step = begin("pruning", sum(len(layer.operators) for layer in loaded.layers), len(earlier))

        def on_operator(report: OperatorReport) -> None:
            step(f"{report.name}  error {report.relative_error:.1e}", report)

        for report in earlier:
            on_operator(report)
        return on_operator

    def _end(self, report: Report) -> None:
        report.seconds, report.memory = self.clock.laps, machine.peak_memory(self.device, self.executor.spawns)

    def _evaluate(self, report: Report, name: str, loaded: HuggingFaceModel, windows: Windows) -> None:
        """Measure perplexity, and for a pruned model the divergence from the dense model."""
        if "evaluation" in windows:
            states = [each.cpu() for each in adapters.last_states(loaded, windows["evaluation"])]
            networks = (adapters.of_states(loaded, each) for each in (self.dense_states, states) if each is not None)
            found, kl = fit(windows["evaluation"], *networks)[-1]
            report.perplexity[name] = vars(found) | ({} if self.dense_states is None else {"kl": kl})
            self.dense_states = self.dense_states or states
            self.clock.lap("evaluation")


def _environment(model: HuggingFaceModel) -> dict[str, Any]:
    return machine.versions() | {
        "machine": platform.machine(),
        "device": str(model.device),
        "dtype": str(model.model.dtype).removeprefix("torch."),
        **machine.processor(model.device),
        "loading": "layer by layer" if model.streams else f"whole: {model.whole_because}",
    }
