"""`convexprune pack`."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from convexprune._cli.application import app, console, print_json
from convexprune._cli.options import AllowChanged, AsJson, Quiet
from convexprune._cli.progress import following
from convexprune._cli.stopping import stoppable


@app.command()
def pack(
    source: Annotated[str, typer.Argument(help="Folder of a model: safetensors files, and others beside them.")],
    output: Annotated[Path, typer.Argument(help="Folder for the pack; must be empty or not there.")],
    allow_changed: AllowChanged = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Make a pruned model smaller to store and to download, without loss. Memory and speed in use stay the same."""
    with stoppable(), following(quiet=quiet):
        from convexprune import _container as container

        packed = container.pack(source, output, allow_changed=allow_changed)
    if as_json:
        print_json(asdict(packed) | {"output_dir": str(packed.output_dir.resolve())})
        return
    before, after = packed.before / 1e6, packed.after / 1e6
    share = packed.after / max(1, packed.before)
    console.print(f"{before:,.1f} MB -> {after:,.1f} MB ({share:.1%}; {packed.bits_text})")
    console.print(f"pack: {packed.output_dir.resolve()}", soft_wrap=True)
    console.print(
        "Unpacked (convexprune unpack), it takes the memory and the time that it took before.", soft_wrap=True
    )
