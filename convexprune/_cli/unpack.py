"""`convexprune unpack`."""

from pathlib import Path
from typing import Annotated

import typer

from convexprune._cli.application import app, console, print_json
from convexprune._cli.options import AllowChanged, AsJson, Quiet
from convexprune._cli.progress import following
from convexprune._cli.stopping import stoppable


@app.command()
def unpack(
    source: Annotated[str, typer.Argument(help="Folder of a pack.")],
    output: Annotated[Path, typer.Argument(help="Folder for the model; must be empty or not there.")],
    allow_changed: AllowChanged = False,
    allow_large: Annotated[
        bool, typer.Option("--allow-large", help="Write more than 400 times the bytes of the pack.")
    ] = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Make an ordinary model folder of a pack. The files are the packed files, byte for byte."""
    with stoppable(), following(quiet=quiet):
        from convexprune import _container as container

        folder = container.unpack(source, output, allow_changed=allow_changed, allow_large=allow_large)
    if as_json:
        print_json({"output_dir": str(folder.resolve())})
        return
    console.print(f"model: {folder.resolve()}", soft_wrap=True)
