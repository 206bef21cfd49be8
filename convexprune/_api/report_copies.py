"""Copies of report and recipe in a folder of the user's choice."""

from convexprune._recipe_file import RECIPE, write_recipe
from convexprune._runs.folder import REPORT
from convexprune._schema.functions import Call
from convexprune._storage.failures import writing
from convexprune._storage.files import atomic_write, make_folder, write
from convexprune._storage.place import output_folder
from convexprune.errors import OutputError
from convexprune.recipe import make_recipe
from convexprune.report import Report


def check_copies(call: Call) -> None:
    """Refuse, before any work, a folder in which copies would replace something."""
    if call.report_dir is None or is_result(call):
        return
    folder = output_folder(call.report_dir)
    there = [name for name in (REPORT, RECIPE) if (folder / name).exists()]
    if there and not (call.resume or call.overwrite):
        raise OutputError(f"{folder} already holds {' and '.join(there)}. Give another report_dir (--save).")


def write_copies(report: Report, call: Call) -> None:
    """Write report.json and recipe.yaml to the requested folder, unless they lie there."""
    if call.report_dir is None or is_result(call):
        return
    folder = call.report_dir.expanduser()
    with writing(folder):
        make_folder(folder)
    with atomic_write(folder / REPORT) as file:
        write(file, report.to_json().encode())
    write_recipe(make_recipe(**report.recipe), folder)


def is_result(call: Call) -> bool:
    """Return True if the folder for copies is the result's folder, where the files lie anyway."""
    folders = [folder.expanduser().resolve() for folder in (call.report_dir, call.output_dir) if folder is not None]
    return len(folders) == 2 and folders[0] == folders[1]
