"""The commands on folders and files that are there: pack, unpack, export, report, recipe."""

from dataclasses import asdict
from math import prod
from pathlib import Path
from typing import Annotated

import typer

from convexprune._cli.application import app, console, print_json, stoppable
from convexprune._cli.options import AllowChanged, AsJson, Quiet
from convexprune._progress.shown import following
from convexprune.errors import OutputError

recipes = typer.Typer(no_args_is_help=True)
app.add_typer(recipes, name="recipe", help="Recipes of other tools, as ours.")


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


@app.command()
def unpack(
    source: Annotated[str, typer.Argument(help="Folder of a pack.")],
    output: Annotated[Path, typer.Argument(help="Folder for the model; must be empty or not there.")],
    allow_changed: AllowChanged = False,
    allow_large: Annotated[
        bool, typer.Option("--allow-large", help="Write more than 400 times the bytes of the pack and 64 MiB.")
    ] = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Make an ordinary model folder of a pack. The files are the packed files, byte for byte."""
    with stoppable(), following(quiet=quiet):
        from convexprune import _container as container

        folder = container.unpack(source, output, allow_changed=allow_changed, allow_large=allow_large)
    _say(folder, as_json)


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
        from convexprune._api.calls import export as write

        folder = write(source, output, format, allow_changed=allow_changed)
        from convexprune._container.folder import source_tensors

        stored = source_tensors(source)[1].values()
        weights = sum(prod(entry.spec.shape) for entries in stored for entry in entries.values())
        files = folder.glob("*.safetensors") if folder.is_dir() else [folder]
        nbytes = sum(path.stat().st_size for path in files)
    _say(folder, as_json)
    if not as_json:
        console.print(f"weights: {nbytes:,} bytes, {8 * nbytes / weights:.2f} bits a weight of all", highlight=False)


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
        from convexprune._container.folder import holds_pack, measured, source_files
        from convexprune._container.provenance import require_as_written
        from convexprune._rendering.page import check_page, page
        from convexprune._runs.folder import PAGE, RunFolder
        from convexprune._storage.files import named, write_text

        folder = named(run)
        report = RunFolder(folder).report()
        place = check_page(output or folder / PAGE)
        if any((folder / name).exists() for name in report.files):  # no copy of the report alone
            require_as_written(folder, allow_changed)
        if report.packed is None and holds_pack(folder):  # packed after its run
            _, files = source_files(folder)
            measured(folder, files, [operator.name for operator in report.operators]).tell(report)
        write_text(place, page(report, str(folder)))
    if as_json:
        print_json({"page": str(place.resolve())})
        return
    console.print(f"page: {place.resolve()}", soft_wrap=True)


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
    from convexprune._storage.files import write_text

    text = f"# from {file.name}, of llm-compressor\n{yaml.safe_dump(translated(file), sort_keys=False)}"
    if output is None:
        print(text, end="")
        return
    write_text(output, text)
    print(f"recipe: {output.resolve()}")


def _say(folder: Path, as_json: bool) -> None:
    if as_json:
        print_json({"output_dir": str(folder.resolve())})
    else:
        console.print(f"model: {folder.resolve()}", soft_wrap=True)
