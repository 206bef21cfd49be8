"""The user's doors: `prune`, and `permute` before it."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from convexprune.adapters import EMBEDDED, EMBEDDED_WINDOW, check_dataset, given_tokenizer, load, recipe_windows
from convexprune.adapters.admission import refuse_headless
from convexprune.adapters.permuting import Permuted, find_permutation, save_permuted
from convexprune.arguments import check_arguments
from convexprune.errors import PatternError
from convexprune.pipeline import check_output, check_patterns
from convexprune.pipeline.files import working
from convexprune.pipeline.machine import default_device, within_memory
from convexprune.pipeline.place import output_folder
from convexprune.pipeline.settings import Tell
from convexprune.progress import begin
from convexprune.recipe import make_recipe
from convexprune.request import Request, name_of
from convexprune.result import PermuteResult, PruneResult
from convexprune.solvers import AbstractSolver
from convexprune.windows import is_self, name_of_text


def prune(
    model: str | Path | PreTrainedModel | None = None,
    solver: str | AbstractSolver = "fista",
    method: str = "convex",
    sparsity: float | None = None,
    pattern: str = "unstructured",
    *,
    preset: str | None = None,
    quota: str = "matrix",
    allocation: str | None = None,
    dataset: Any = "self",
    tokenizer: PreTrainedTokenizerBase | str | Path | None = None,
    num_calibration_samples: int = 128,
    held_out_samples: int | None = None,
    max_seq_length: int | None = None,
    batch_size: int = 1,
    seed: int = 0,
    bound_rows: int = 2,
    targets: Sequence[str] = ("Linear",),
    ignore: Sequence[str] = (),
    error_correction: float | bool | None = None,
    correct: str | None = None,
    prefix: str = "dense",
    damping: float | None = None,
    refit: bool | None = None,
    method_args: dict[str, Any] | None = None,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype | None = None,
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
    output_dir: str | Path | None = None,
    resume: bool = False,
    executor: str = "serial",
    workers: int | None = None,
    threads: int | None = None,
    evaluation: str | Path | Tensor | None = None,
    progress: Callable[[int], Tell] | None = None,
) -> PruneResult:
    """Prune a language model; the report has the certificate of every operator's convex solve.

    Args:
        model: a folder, a name on the hub, or a loaded model, which moves to `device` and `dtype` and is changed in
            place: it keeps its modes (train, eval) and `requires_grad`, and is pruned only if the run succeeds. For
            that, a copy of its decoder layers is in the memory of the CPU meanwhile. None: the small OPT model that is
            bundled.
        solver: of method="convex": "fista" (production), "admm", "cvxpy" or "scipy" (ground truth, for very small
            models), or your own `AbstractSolver`.
        method: "convex", "admm" (the pattern as a constraint), or a baseline: "alps", "sparsegpt", "wanda",
            "magnitude", "fistapruner".
        sparsity: share of zeros in every operator, in [0, 1); None is 0.5, or what the pattern fixes.
        pattern: "unstructured"; "N:M" for N non-zeros in every M inputs ("2:4"); "columns" for inputs that are removed
            from all rows; or "int8" for rounding to whole numbers of 8 bits times a scale for each row, with no share
            of zeros (the methods "magnitude" and "wanda").
        preset: "fistapruner" is the algorithm of arXiv 2408.03728 as published, for comparison.
        quota: where the share of zeros holds: in each "matrix" or in each "row" of it.
        allocation: how the zeros are spread: "uniform", the same share in each operator; "rows", that too, but its rows
            compete for it by how much they move the loss (gradients on a few windows first); "curve", the shares of
            least predicted loss as well, from error curves weighted by these gradients (a survey of the dense model,
            which takes about five times as long as SparseGPT); "half-curve", half of the way there; "owl" or
            "skewness", by the shape of each decoder layer's scores. N:M patterns take "uniform" and "curve".
            None: "rows" for the methods "convex" and "admm" with a quota of each matrix, else "uniform".
        dataset: calibration tokens: "self" (sampled from the model), "c4", "wikitext2", "ptb" or another data set of
            the hub (needs the package datasets), a .txt or .jsonl path, a list of texts, or token ids: as tensors,
            arrays, lists, or an iterable of them (a DataLoader).
        tokenizer: for a loaded model and a data set of text: an object of transformers, or its folder or name.
        num_calibration_samples: windows of `max_seq_length` tokens (None: the rows' own length; for text 2048, or the
            model's limit if less; 256 for the bundled model).
        held_out_samples: windows more, on which errors are measured and nothing is fitted; None: an eighth as many,
            or what the data set has left.
        batch_size: windows in one forward pass.
        seed: of the choice of windows and of "self" sampling.
        bound_rows: rows of every operator whose error the report compares with a certified lower bound on that of any
            pruning (docs/certificates.md); 0: none.
        targets: operators to prune: names, their endings, "re:" patterns, or "Linear".
        ignore: operators not to prune, as `targets`.
        error_correction: how much an operator makes up for those pruned before it, 0 to 1; None: 1, or 1/2 with
            prefix="pruned".
        correct: which error: of an "operator" what its own outputs lack, as published; or of the one whose outputs are
            added last to those of the decoder "layer", all that these lack. None: the layer's, but for "fistapruner".
        prefix: which network feeds a decoder layer while it is pruned: the "dense" one, or the one "pruned" so far.
        damping: of "convex", "admm" and a refit that refit=True adds: pull to the dense weight, relative to the Gram
            matrix's diagonal; None: from the sampling noise. Others have their own in `method_args`.
        refit: least squares on the support that was found, for any method or for none; None: as the method has it.
        method_args: further settings of the method's class in `convexprune.pruners`.
        device: "auto" is the GPU if there is one; "cpu", "cuda", "cuda:1", or torch's own object.
        dtype: "float32", "bfloat16", "float16", or torch's own object; None is the checkpoint's, of the bundled
            model float32.
        trust_remote_code: let transformers run code that a checkpoint brings.
        allow_pickle: read checkpoints that are pickles, which can run code.
        output_dir: where to write the model, `recipe.yaml` and `report.json`; must be empty. The model is then never
            whole in memory, if its checkpoint allows it (see docs/runs.md), and the run can be interrupted.
        resume: go on with the unfinished run in `output_dir`, if there is one; a finished one is handed back.
        executor: who prunes: "serial" (this process), "pool" (processes on this machine, one for each GPU), "ranks"
            (of torchrun or SLURM, all started with this same call), or "ray" (needs Ray). All but the
            first need an `output_dir` that all of them see, and a model that can be opened there. With
            prefix="pruned" layers wait for each other: "ranks" then share out the samples of each layer.
        workers: how many, for "pool" and "ray"; None: one for each GPU, or as many as the cores have room for.
        threads: that a layer is pruned on; None: what torch has, divided by the workers. The bits depend on it.
        evaluation: what to measure perplexity on, before and after: "self" (sampled from the dense model, apart from
            the calibration stream), a text file, or token windows [windows window]. None: not measured.
        progress: called with the number of operators, returns what is called with each operator's report.

    Raises:
        ConvexpruneError: see `convexprune.errors`; bad input is refused before any work.
    """
    settings = dict(locals())
    check_arguments(settings)
    if model is None:
        settings |= {"model": EMBEDDED, "dtype": dtype or "float32"}
        settings |= {"max_seq_length": max_seq_length or EMBEDDED_WINDOW}
    with within_memory():
        if output_dir is None:
            return Request(settings).in_memory()
        with working(Path(output_dir)):
            return Request(settings).in_folder(output_folder(output_dir, model), resume)


def permute(
    model: str | Path | PreTrainedModel | None = None,
    pattern: str = "2:4",
    *,
    dataset: Any = "self",
    tokenizer: PreTrainedTokenizerBase | str | Path | None = None,
    num_calibration_samples: int = 16,
    max_seq_length: int | None = None,
    batch_size: int = 1,
    seed: int = 0,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype | None = None,
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
    output_dir: str | Path | None = None,
    progress: Callable[[int], Callable[[Permuted], None]] | None = None,
) -> PermuteResult:
    """Put the channels of a dense model in an order of which an N:M pattern prunes less; it computes what it did.

    What an N:M pattern keeps depends on which inputs stand side by side. Channels inside of an MLP, inside of an
    attention head, and those of the hidden states may change places without a change of the function, if the rows that
    make them and the columns that read them do so alike (Pool & Yu, NeurIPS 2021): which they are is found by
    experiments on the model, and the result is tried. Prune the permuted model as any other. Adapters (LoRA) that were
    trained on the model in its old order do not fit the new one.

    Args:
        model: as for `prune`; a loaded one is changed in place.
        pattern: "N:M" for N non-zeros in every M inputs.
        dataset: tokens on which inputs are measured, as for `prune`.
        tokenizer: for a loaded model and a data set of text: an object of transformers, or its folder or name.
        num_calibration_samples: windows of `max_seq_length` tokens.
        max_seq_length: as for `prune`.
        batch_size: windows in one forward pass.
        seed: of the choice of windows, and of the search.
        device, dtype, trust_remote_code, allow_pickle: as for `prune`.
        output_dir: where to write the model, and `permutation.json` with every order; must be empty. The model is then
            never whole in memory, if its checkpoint allows it.
        progress: called with the number of sets of channels, returns what is called with each as it is done.

    Raises:
        ConvexpruneError: see `convexprune.errors`; bad input is refused before any work.
    """
    check_arguments({"progress": progress, "output_dir": output_dir})
    if model is None:
        model, dtype, max_seq_length = EMBEDDED, dtype or "float32", max_seq_length or EMBEDDED_WINDOW
    recipe = make_recipe(
        model=name_of(model),
        pattern=pattern,
        dataset=name_of_text(dataset),
        num_calibration_samples=num_calibration_samples,
        held_out_samples=0,
        max_seq_length=max_seq_length,
        batch_size=batch_size,
        seed=seed,
        device=device,
        dtype=dtype,
    )
    asked = recipe.build_pattern()
    if asked.block == 1:
        raise PatternError(f"Pattern {pattern!r} does not see the order of channels. Accepted: 'N:M', '2:4' say.")
    place = default_device(recipe.device)
    check_dataset(dataset)
    folder = None if output_dir is None else output_folder(output_dir, model)
    if folder is not None:
        check_output(folder)
    opened = partial(
        load,
        device=place,
        dtype=recipe.torch_dtype,
        tokenizer=given_tokenizer(tokenizer),
        trust_remote_code=trust_remote_code,
        allow_pickle=allow_pickle,
    )

    def read() -> PreTrainedModel:
        with opened(folder or model).lent() as permuted:
            return permuted.model

    begin("loading the model")
    with opened(model, stream=folder is not None).lent() as loaded:
        refuse_headless(loaded.model, {"permute": ""})
        check_patterns(loaded.layers, recipe.layer_settings())  # what `prune` refuses afterwards
        sampler = opened(model) if loaded.streams and is_self(dataset) else loaded  # to sample text it has to be whole
        tokens, _ = recipe_windows(dataset, sampler, recipe)
        del sampler
        found = find_permutation(loaded, tokens, asked, batch_size, seed, progress)
        if folder is None:
            found.apply(loaded.model)
        else:
            save_permuted(loaded, found, folder)
        changed = read if loaded.streams else lambda: loaded.model
        return PermuteResult(permutation=found, output_dir=folder, _model=changed)
