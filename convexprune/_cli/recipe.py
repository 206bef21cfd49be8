"""`convexprune recipe from-llmcompressor`."""

from pathlib import Path
from typing import Annotated

import typer

from convexprune._cli.application import app
from convexprune.errors import OutputError

recipes = typer.Typer(no_args_is_help=True)
app.add_typer(recipes, name="recipe", help="Recipes of other tools, as ours.")


@recipes.command("from-llmcompressor")
def from_llmcompressor(
    file: Annotated[Path, typer.Argument(help="A recipe of llm-compressor, YAML or JSON.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="File for our recipe. Left out: it is printed.")
    ] = None,
) -> None:
    """Translate a recipe of llm-compressor. Entries without an equivalent are refused by name.

    Prune by the result: convexprune prune MODEL --recipe FILE.
    """
    if output is not None and (output.exists() or output.is_symlink()):
        raise OutputError(f"{output} is there already. Give another file.")
    if output is not None and not output.parent.is_dir():
        raise OutputError(f"{output}: there is no folder {output.parent}. Make it, or give another file.")
    import yaml

    from convexprune._api.llmcompressor import from_llmcompressor as translated
    from convexprune._storage.files import atomic_write, write

    text = f"# from {file.name}, of llm-compressor\n{yaml.safe_dump(translated(file), sort_keys=False)}"
    if output is None:
        print(text, end="")
        return
    with atomic_write(output) as to:
        write(to, text.encode())
    print(f"recipe: {output.resolve()}")
