"""What `prune` and `permute` give back."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from convexprune.adapters._channels.permuting import Permutation
from convexprune.report import Report


@dataclass(frozen=True, eq=False, kw_only=True)
class _Result:
    """A model that was changed, and where it was written, if anywhere."""

    output_dir: Path | None
    _model: Callable[[], PreTrainedModel]

    @cached_property
    def model(self) -> PreTrainedModel:
        """The model: the one that was changed in memory, else read from `output_dir` now."""
        return self._model()

    def _shown(self, what: object) -> str:
        place = "in memory" if self.output_dir is None else f"in {self.output_dir}"
        return f"{type(self).__name__}({what}, {place})"


@dataclass(frozen=True, eq=False, kw_only=True)
class PruneResult(_Result):
    """A pruned model and its report; see also `output_dir` and `model`.

    Args:
        report: what happened, operator by operator.
        tokenizer: of the model, if it has one.
    """

    report: Report
    tokenizer: PreTrainedTokenizerBase | None

    def __repr__(self) -> str:
        return self._shown(self.report)


@dataclass(frozen=True, eq=False, kw_only=True)
class PermuteResult(_Result):
    """A permuted model; see also `output_dir` and `model`.

    Args:
        permutation: the order of each set of channels.
    """

    permutation: Permutation

    def __repr__(self) -> str:
        return self._shown(self.permutation)
