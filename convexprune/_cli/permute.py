"""`convexprune permute`."""

from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from convexprune._cli.application import app, console, print_json, show
from convexprune._cli.options import AsJson, Quiet, also_called, with_settings
from convexprune._cli.progress import following
from convexprune._cli.stopping import stoppable
from convexprune._schema.functions import PERMUTE

if TYPE_CHECKING:
    from convexprune.adapters._channels.permuting import Permutation, Permuted


@app.command(context_settings=also_called(PERMUTE))
@with_settings(PERMUTE, "model", output_dir=Path("permuted"))
def permute(settings: dict[str, Any], as_json: AsJson = False, quiet: Quiet = False) -> None:
    """Order the channels of a dense model so that N:M costs less. The model computes the same as before."""
    with stoppable(), following(quiet=quiet) as shown:
        from transformers.utils.logging import disable_progress_bar

        from convexprune._api import calls as api

        disable_progress_bar()

        def follow(total: int) -> "Callable[[Permuted], None]":
            step = shown("permuting", total)
            return lambda one: step(f"{one.channels.name}  {one.before:.4f} -> {one.after:.4f}")

        result = api.permute(**settings, progress=follow)
    done, folder = result.permutation, result.output_dir
    assert folder is not None
    if as_json:
        print_json(done.to_dict() | {"output_dir": str(folder.resolve())})
        return
    show(_table(done))
    for name, why in done.left.items():
        console.print(f"left in their order: {name}: {why}", soft_wrap=True)
    console.print(f"permuted model: {folder.resolve()}", soft_wrap=True)


def _table(done: "Permutation") -> Table:
    table = Table("channels of", "sets", "each", "pruned share", "permuted", box=SIMPLE_HEAD)
    table.caption = "The share of W_ij^2 mean x_j^2 that the pattern prunes, before and after: less is better."
    kinds: dict[tuple[str, int], list[Permuted]] = defaultdict(list)
    for one in done.permuted:
        kinds[one.kind, one.channels.size].append(one)
    for (kind, size), alike in kinds.items():
        shares = [sum(each) / len(alike) for each in zip(*((one.before, one.after) for one in alike), strict=True)]
        table.add_row(kind, str(len(alike)), str(size), *(f"{share:.4f}" for share in shares))
    return table
