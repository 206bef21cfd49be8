"""Copies of report and recipe in a folder of the user's choice."""

import os
from pathlib import Path

from convexprune._recipe_file import RECIPE, read_recipe, write_recipe
from convexprune._runs.folder import REPORT, RunFolder
from convexprune._schema.functions import Call
from convexprune._storage.files import write_text
from convexprune._storage.staging import output_folder
from convexprune.errors import ConvexpruneError, OutputError
from convexprune.recipe import make_recipe
from convexprune.report import Report


def check_copies(call: Call) -> None:
    """Refuse, before any work, a folder in which copies would replace what is not such a copy."""
    if call.report_dir is None or is_result(call):
        return
    folder = output_folder(call.report_dir, is_staged=False)
    there = [name for name in (REPORT, RECIPE) if os.path.lexists(folder / name)]
    if there and not (call.resume or call.overwrite):
        raise OutputError(f"{folder} already holds {' and '.join(there)}. Give another report_dir (--save).")
    _require_copies(folder)


def write_copies(report: Report, call: Call) -> None:
    """Write report.json and recipe.yaml where the call wants them, unless they lie there."""
    if call.report_dir is None or is_result(call):
        return
    folder = output_folder(call.report_dir, is_staged=False)
    _require_copies(folder)
    write_text(folder / REPORT, report.to_json())
    write_recipe(make_recipe(**report.recipe), folder)


def is_result(call: Call) -> bool:
    """Return True if the folder for copies is that of the result of the `call`, where they lie anyway."""
    folders = [folder.expanduser().resolve() for folder in (call.report_dir, call.output_dir) if folder is not None]
    return len(folders) == 2 and folders[0] == folders[1]


def _require_copies(folder: Path) -> None:
    """Refuse a folder with files of these names that are no report and no recipe of a run."""
    reads = {REPORT: lambda: RunFolder(folder).report(), RECIPE: lambda: read_recipe(folder / RECIPE)}
    for name, read in reads.items():
        if os.path.lexists(path := folder / name):
            try:
                if path.is_symlink():
                    raise OutputError("a link")
                read()
            except ConvexpruneError as cause:
                raise OutputError(
                    f"{path} was not written by a run, and is not replaced. Give another report_dir (--save)."
                ) from cause
