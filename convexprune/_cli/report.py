"""`convexprune report`."""

from pathlib import Path
from typing import Annotated

import typer

from convexprune._cli.application import app, console, print_json
from convexprune._cli.options import AllowChanged, AsJson
from convexprune._cli.stopping import stoppable


@app.command()
def report(
    run: Annotated[str, typer.Argument(help="Folder of a finished run; also one that is packed.")],
    output: Annotated[
        Path | None,
        typer.Option(help="File to write; a page that is there is replaced. Left out: report.html in the folder."),
    ] = None,
    allow_changed: AllowChanged = False,
    as_json: AsJson = False,
) -> None:
    """Write the page of a run. Errors, zeros, certificates and next steps, as a single HTML file without a network."""
    with stoppable():
        from convexprune._container.provenance import require_as_written
        from convexprune._rendering.page import check_page, write_page
        from convexprune._runs.folder import PAGE, RunFolder
        from convexprune._storage.files import named

        folder = named(run)
        place = check_page(output or folder / PAGE)
        report = RunFolder(folder).report()
        if any((folder / name).exists() for name in report.files):  # no copy of the report alone
            require_as_written(folder, allow_changed)
        page = write_page(report, place, str(folder))
    if as_json:
        print_json({"page": str(page.resolve())})
        return
    console.print(f"page: {page.resolve()}", soft_wrap=True)
