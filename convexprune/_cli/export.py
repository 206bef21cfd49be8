"""`convexprune export`."""

from pathlib import Path
from typing import Annotated

import typer

from convexprune._cli.application import app, console, print_json
from convexprune._cli.options import AllowChanged, AsJson, Quiet
from convexprune._cli.stopping import stoppable
from convexprune._progress.shown import following


@app.command()
def export(
    source: Annotated[str, typer.Argument(help="Folder that `prune` has written.")],
    output: Annotated[Path, typer.Argument(help="Folder, or file, for the export; must be empty or not there.")],
    format: Annotated[str, typer.Option("--format", help="compressed-tensors or gguf.")] = "compressed-tensors",
    allow_changed: AllowChanged = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Write a model as other engines load it. vLLM takes the format compressed-tensors, llama.cpp takes gguf."""
    with stoppable(), following(quiet=quiet):
        from convexprune._api.exporting import export as write

        folder = write(source, output, format, allow_changed=allow_changed)
    if as_json:
        print_json({"output_dir": str(folder.resolve())})
        return
    console.print(f"model: {folder.resolve()}", soft_wrap=True)
