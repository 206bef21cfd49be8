"""The windows of token ids for calibration and evaluation, and their sources."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from convexprune._recipe_file import given
from convexprune.adapters import (
    HuggingFaceModel,
    calibration_and_held_out,
    check_dataset,
    recipe_windows,
    text_windows,
    window_length,
)
from convexprune.adapters._data.documents import TEXT_FILES, check_text
from convexprune.adapters._data.sources import addressed, needs_sampling, parts_of
from convexprune.errors import CalibrationError
from convexprune.recipe import Recipe

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
        check_dataset(self.dataset)
        text = self.evaluation
        if isinstance(text, str | Path) and text not in ("self", HELD_OUT):
            check_text(Path(text))
        elif not (text is None or isinstance(text, str | Tensor)):
            raise CalibrationError(
                f"evaluation is a {type(text).__name__}. Accepted: 'held-out', 'self', a path to a .txt or .jsonl "
                "file, or token ids as a tensor [windows window]."
            )

    def sampled(self, windows: Windows) -> dict[str, Tensor]:
        """Return the part of the `windows` that the model writes."""
        return {name: tokens for name, tokens in windows.items() if needs_sampling(self._by_use[name])}

    @property
    def has_sampled(self) -> bool:
        return any(map(needs_sampling, self._by_use.values()))

    def draw(
        self, model: HuggingFaceModel, recipe: Recipe, known: Windows, whole: Callable[[], HuggingFaceModel]
    ) -> Windows:
        """Return the windows of token ids for a run.

        A model has to be whole in memory to sample text: a streamed model is opened whole for sampling, and released.
        """
        windows, to_sample = self.sampled(known), [name for name, text in self._by_use.items() if needs_sampling(text)]
        is_given = isinstance(self.evaluation, Tensor) or self.evaluation not in (None, "self", HELD_OUT)
        if needs_sampling(self.dataset) and is_given:
            # Before the model writes its own text, which takes long: this one may be too short.
            windows["evaluation"] = self._to_evaluate(model, window_length(model, recipe.max_seq_length), recipe)
        sampler = whole() if model.streams and not windows.keys() >= set(to_sample) else model
        if "calibration" not in windows:
            windows["calibration"], windows["held_out"] = recipe_windows(self.dataset, sampler, recipe)
        if isinstance(self.evaluation, str) and self.evaluation == HELD_OUT:
            if not len(windows["held_out"]):
                raise CalibrationError(
                    f"evaluation={HELD_OUT!r}: no sample is held out. Give more text, held_out_samples, or another "
                    "text to evaluate on (--eval-text)."
                )
            windows["evaluation"] = windows["held_out"]
        if self.evaluation is not None and "evaluation" not in windows:
            windows["evaluation"] = self._to_evaluate(sampler, windows["calibration"].shape[1], recipe)
        return windows

    def _to_evaluate(self, model: HuggingFaceModel, window: int, recipe: Recipe) -> Tensor:
        if isinstance(self.evaluation, Tensor):
            return self.evaluation
        if self.evaluation == "self":
            settings = {"num_samples": EVALUATION_SAMPLES, "max_seq_length": window, "seed": recipe.seed}
            return calibration_and_held_out("self", model, split="evaluation", **settings)[0]
        return text_windows(Path(self.evaluation), model, window)

    @property
    def _by_use(self) -> dict[str, Any]:
        return dict.fromkeys(OF_DATASET, self.dataset) | {"evaluation": self.evaluation}


def name_of_text(text: Any) -> str:
    """Return the name of a data set or a text for the recipe: a full path, a name, or a description."""
    if not isinstance(text, str | Path):
        return given(text)
    if len(parts := parts_of(text)) > 1:
        return ",".join(f"{name_of_text(name)}:{share:g}" for name, share in parts)
    name, column, _ = addressed(parts[0][0])
    path = Path(name).expanduser()
    whole = path.suffix in TEXT_FILES and path.is_file()
    return f"{path.absolute()}{'' if column is None else f'#{column}'}" if whole else str(parts[0][0])
