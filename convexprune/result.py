"""What `prune` and `permute` give back."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from convexprune.adapters.permuting import Permutation
from convexprune.report import Report


@dataclass(frozen=True, eq=False)
class PruneResult:
    """What a run gave: its report, and where the pruned model was written, if anywhere."""

    report: Report
    tokenizer: PreTrainedTokenizerBase | None
    output_dir: Path | None
    _model: Callable[[], PreTrainedModel]

    @cached_property
    def model(self) -> PreTrainedModel:
        """The pruned model: the one that was pruned in memory, else read from `output_dir` now."""
        return self._model()

    def __repr__(self) -> str:
        return f"PruneResult({self.report}, {_place(self.output_dir)})"


@dataclass(frozen=True, eq=False)
class PermuteResult:
    """What was permuted, and where the permuted model was written, if anywhere."""

    permutation: Permutation
    output_dir: Path | None
    _model: Callable[[], PreTrainedModel]

    @cached_property
    def model(self) -> PreTrainedModel:
        """The permuted model: the one that was permuted in memory, else read from `output_dir` now."""
        return self._model()

    def __repr__(self) -> str:
        return f"PermuteResult({self.permutation}, {_place(self.output_dir)})"


def _place(folder: Path | None) -> str:
    return "in memory" if folder is None else f"in {folder}"
