"""Upload a result to the Hugging Face hub: only files of the run are uploaded, and a failure loses nothing."""

import glob
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants, get_token
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from convexprune._container.file import packed_name
from convexprune._recipe_file import write_recipe
from convexprune._rendering.card import write_card
from convexprune._rendering.facts import name_of_model
from convexprune._rendering.page import write_page
from convexprune._runs.folder import PAGE, REPORT
from convexprune._storage.files import write_text
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


def write_result(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, report: Report, folder: Path
) -> None:
    """Write a model pruned in memory as a folder, with all companions of a run."""
    model.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    write_recipe(make_recipe(**report.recipe), folder)
    write_card(report, folder)
    write_page(report, folder / PAGE)
    write_text(folder / REPORT, report.to_json())
