"""The results of `prune` and `permute`."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from convexprune._api.publishing import check_hub, upload, write_result
from convexprune.adapters._channels.permuting import Permutation
from convexprune.report import Report


@dataclass(frozen=True, eq=False, kw_only=True)
class _Result:
    output_dir: Path | None
    _model: Callable[[], PreTrainedModel]

    @cached_property
    def model(self) -> PreTrainedModel:
        """The model: changed in memory, or read from `output_dir` now."""
        return self._model()

    def _shown(self, what: object) -> str:
        place = "in memory" if self.output_dir is None else f"in {self.output_dir}"
        return f"{type(self).__name__}({what}, {place})"


@dataclass(frozen=True, eq=False, kw_only=True)
class PruneResult(_Result):
    """A pruned model and its report; see also `output_dir` and `model`.

    Args:
        report: record of the run by operator.
        tokenizer: tokenizer of the model, or None.
    """

    report: Report
    tokenizer: PreTrainedTokenizerBase | None

    def __repr__(self) -> str:
        return self._shown(self.report)

    def push_to_hub(
        self, repo_id: str, *, private: bool | None = None, token: str | bool | None = None, **commit: Any
    ) -> str:
        """Upload the result with its model card, as `push_to_hub` of transformers does.

        Only files of the run are uploaded from a folder; `recipe.yaml`, `report.json` and `report.html` name folders of
        this machine.

        Args:
            repo_id: name of the repository, "OWNER/NAME"; created if missing.
            private: visibility; None means the owner's default, mostly public.
            token: token of the hub; None means the stored login.
            commit: further arguments of `huggingface_hub.HfApi.upload_folder`: commit_message, revision, create_pr, ...

        Returns:
            The address of the repository.

        Raises:
            RecipeError: the name is no name on the hub, the hub is switched off, or nobody has logged in.
            OutputError: the upload failed; the result is unchanged.
        """
        options: dict[str, Any] = {"private": private, "token": token, **commit}
        if self.output_dir is not None:
            again = f"resume=True (--resume) uploads it, or: hf upload {repo_id} {self.output_dir}"
            kept = f"the result is in {self.output_dir}; {again}"
            return upload(self.output_dir, self.report, repo_id, kept=kept, **options)
        check_hub(repo_id, token)
        with TemporaryDirectory() as folder:
            write_result(self.model, self.tokenizer, self.report, Path(folder))
            return upload(Path(folder), self.report, repo_id, kept="the result is in memory, as it was.", **options)


@dataclass(frozen=True, eq=False, kw_only=True)
class PermuteResult(_Result):
    """A permuted model; see also `output_dir` and `model`.

    Args:
        permutation: the order of every set of channels.
    """

    permutation: Permutation

    def __repr__(self) -> str:
        return self._shown(self.permutation)
