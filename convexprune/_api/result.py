"""The results of `prune` and `permute`, and their upload: a failure loses nothing."""

import glob
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub import HfApi, constants, get_token
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from convexprune._container.file import packed_name
from convexprune._recipe_file import write_recipe
from convexprune._rendering.card import write_card
from convexprune._rendering.facts import facts, name_of_model
from convexprune._rendering.page import page
from convexprune._runs.folder import PAGE, REPORT
from convexprune._storage.failures import working
from convexprune._storage.files import write_json, write_text
from convexprune._storage.staging import Staging
from convexprune.adapters import Permutation
from convexprune.core._arrays import Shown
from convexprune.errors import OutputError, RecipeError, shown
from convexprune.recipe import make_recipe
from convexprune.report import Report


def check_hub(name: str, token: str | bool | None = None) -> None:
    """Refuse, before any work, a name that the hub rejects, and an impossible upload."""
    try:
        validate_repo_id(name)
    except HFValidationError as cause:
        raise RecipeError(
            f"push_to_hub={name!r} is no name on the hub: {shown(str(cause))} Write OWNER/NAME."
        ) from cause
    if constants.HF_HUB_OFFLINE:
        raise RecipeError(
            "push_to_hub: HF_HUB_OFFLINE is set, so nothing is uploaded. Unset it, or leave push_to_hub out."
        )
    if not isinstance(token, str) and get_token() is None:
        raise RecipeError("push_to_hub: nobody has logged in to the hub. Run `hf auth login`, or set HF_TOKEN.")


def upload(
    folder: Path, report: Report, name: str, *, kept: str, private: bool | None, token: str | bool | None, **commit: Any
) -> str:
    check_hub(name, token)
    packs = (packed_name(Path(file)).as_posix() for file in report.files)
    own = {*report.files, *packs, *report.documents, REPORT, PAGE} if report.files else {"*"}
    title = f"{name_of_model(report)}, pruned by convexprune"
    hub = HfApi(token=token)
    try:
        made = hub.create_repo(name, private=private, exist_ok=True)
        allowed = sorted(each if each == "*" else glob.escape(each) for each in own)
        given = {"commit_message": title, "allow_patterns": allowed} | commit
        hub.upload_folder(repo_id=made.repo_id, folder_path=folder, **given)
    except Exception as cause:  # the kinds are those of requests or httpx, by the release of huggingface_hub
        raise OutputError(
            f"The upload to {name} failed ({type(cause).__name__}: {shown(str(cause))}). Nothing is lost: {kept}"
        ) from cause
    return str(made)


def held(model: PreTrainedModel) -> Callable[[], PreTrainedModel]:
    """Return a function that returns the model, and that can be pickled with it."""
    return partial(_itself, model)


def _itself(model: PreTrainedModel) -> PreTrainedModel:
    return model


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
class PruneResult(Shown, _Result):
    """A pruned model and its report; see also `output_dir` and `model`.

    Args:
        report: record of the run by operator.
        tokenizer: tokenizer of the model, or None.
    """

    report: Report
    tokenizer: PreTrainedTokenizerBase | None
    _removed: Mapping[str, Any] = field(default_factory=dict)  # what was removed, by the name of its file

    def __repr__(self) -> str:
        return self._shown(self.report)

    def facts(self) -> dict[str, str]:
        """Return the statements of the model card by title."""
        return {fact.name: fact.text for fact in facts(self.report)}

    def save(self, folder: str | Path) -> Path:
        """Write a model that was pruned in memory, with its tokenizer, card, page, recipe and report.

        Args:
            folder: new or empty folder. It is written whole, or not at all.

        Returns:
            The folder.

        Raises:
            OutputError: the folder holds something, or the result lies in a folder already.
        """
        if self.output_dir is not None:
            raise OutputError(f"The result lies in {self.output_dir} already: copy that folder.")
        staging = Staging.of_new(folder)
        with working(staging.output), staging.whole() as place:
            self._write(place)
        return staging.output

    def _write(self, folder: Path) -> None:
        self.model.save_pretrained(folder)
        if self.tokenizer is not None:
            self.tokenizer.save_pretrained(folder)
        for name, note in self._removed.items():
            write_json(folder / name, note)
        write_recipe(make_recipe(**self.report.recipe), folder)
        write_card(self.report, folder)
        write_text(folder / PAGE, page(self.report))
        write_text(folder / REPORT, self.report.to_json())

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
            self._write(Path(folder))
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
