"""`bench`: time prompts and generation in all formats of torch."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from rich.box import SIMPLE_HEAD
from rich.table import Table
from torch import Tensor, nn
from transformers import PreTrainedModel

from convexprune._device.machine import default_device
from convexprune._device.switches import pinned
from convexprune._progress import begin
from convexprune._schema import functions as doors
from convexprune._schema.parameters import documented
from convexprune.adapters import LINEAR_MODULES, HuggingFaceModel, ParameterOperator, bundled_if_none, load
from convexprune.errors import ModelError

from ._formats import FORMATS, AbstractProduct
from ._timing import Timing, time_in_turns, timing

ROUNDS = 6  # of generation, for which its share of the time is divided


@dataclass(frozen=True)
class Bench:
    """Timings on a device.

    Args:
        dense: the reference format: "float32", or "bfloat16" for a checkpoint in 16 bits.
        zeros: the fraction of zeros in the weights.
        left_out: reasons by name of a format without timings.
    """

    model: str
    device: str
    dense: str
    zeros: float
    timings: list[Timing]
    left_out: dict[str, str]

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"verdict": self.verdict()}

    def tables(self) -> Iterator[Table]:
        heads = ("", "batch", "format", "tokens/s", "time over dense", "middle half", "rounds", "MB read")
        table = Table(*heads, box=SIMPLE_HEAD)
        table.title = f"The whole model of {self.model} ({self.zeros:.0%} zeros) on {self.device}"
        for t in self.timings:
            table.add_row(*t.cells())
        yield table

    def verdict(self) -> list[str]:
        """Return a sentence per format, generation beside the dense format or the reason without timings, and rates."""
        lines = []
        for name in FORMATS:
            if name in self.left_out:
                lines.append(f"{name}: not timed here: {self.left_out[name]}.")
            elif name != self.dense:
                parts = [t.verdict for t in self.timings if t.format == name and t.what == "decode"]
                lines.append(f"{name} beside {self.dense}, generating here: {', '.join(parts)}.")
        decoded = [t for t in self.timings if t.what == "decode"]
        least = min(t.batch for t in decoded)
        rates = [f"{t.format} {t.tokens_per_second:.3g}" for t in decoded if t.batch == least]
        return [*lines, f"Tokens/s at batch {least} on {self.device}: {', '.join(rates)} ({self.zeros:.0%} zeros)."]


@torch.no_grad()
@pinned()
@documented(doors.BENCH)
def bench(model: str | Path | PreTrainedModel | None = None, **settings: Any) -> Bench:
    """Time a model's prompts and generation, dense and in every available format.

    Formats take turns, so that all meet the same noise. Zeros change the speed of sparse formats only: CSR reads
    non-zeros, and 2:4 needs the pattern.

    Args:
        model: a folder, a name on the hub, or a loaded model; None: the bundled one.

    Returns:
        Medians, their spread, and bytes, by format.
    """
    asked, shared = doors.BENCH.read(settings)
    place = default_device(shared.get("device", "auto"))
    begin("loading the model")
    source = bundled_if_none({"model": model})["model"]
    with load(
        source, device=place, trust_remote_code=asked.trust_remote_code, allow_changed=asked.allow_changed
    ).lent() as loaded:
        linears = _linears(loaded)
        if not linears:
            raise ModelError(
                "All operators of this model are experts in fused parameters, which bench keeps as they are: there is "
                "nothing to time. Give a model with linear layers of its own."
            )
        weights = [weight for _, weight, _ in linears]
        zeros = sum(int((w == 0).sum()) for w in weights) / sum(w.numel() for w in weights)
        dense = "float32" if loaded.model.dtype == torch.float32 else "bfloat16"
        left_out = {name: why for name in FORMATS if (why := _why_not(FORMATS[name], weights))}
        formats = {name: made for name, made in FORMATS.items() if name not in left_out}
        timings = _generation(loaded, linears, formats, dense, asked, place)
        is_gpu = place.startswith("cuda")
        where = torch.cuda.get_device_name(place) if is_gpu else f"cpu, {torch.get_num_threads()} threads"
        return Bench(loaded.name, where, dense, zeros, timings, left_out)


Linear = tuple[nn.Module, Tensor, Tensor | None]  # a module, its weight [m n], its bias [m]


def _linears(model: HuggingFaceModel) -> list[Linear]:
    """Return the operators that are separate modules; fused experts stay unchanged in every format."""
    found = []
    for layer in model.layers:
        for operator in layer.operators:
            assert isinstance(operator, ParameterOperator)
            module = layer.module.get_submodule(operator.place.module)
            if isinstance(module, LINEAR_MODULES):
                found.append((module, operator.read(), module.bias))
    return found


def _why_not(made: type[AbstractProduct], weights: Sequence[Tensor]) -> str | None:
    """Return the reason why a format is not available: a weight does not fit, or the product fails on this device."""
    if why := next(filter(None, map(made.why_not, weights)), None):
        return why
    first = weights[0]
    try:
        made(first, None)(torch.zeros(2, first.shape[1], dtype=made.dtype, device=first.device))
    except Exception as error:  # whatever another package raises when it compiles or loads its kernel
        return f"torch {torch.__version__}: {str(error).splitlines()[0][:120]}"
    return None


def _generation(
    model: HuggingFaceModel,
    linears: Sequence[Linear],
    formats: Mapping[str, type[AbstractProduct]],
    dense: str,
    asked: doors.Bench,
    device: str,
) -> list[Timing]:
    """Time the whole model: a prompt, and generated tokens. Two models are in memory: dense, and in a single format."""
    others = [name for name in formats if name != dense] or [dense]
    step, found = begin("timing generation", len(others)), []
    batches = dict.fromkeys(asked.batches)  # each once
    reference = _converted(model, linears, formats[dense])
    prompt = min(asked.prompt, model.max_positions)
    new_tokens = max(1, min(asked.new_tokens, model.max_positions - 1))  # after a single token
    seconds = asked.seconds / (len(others) * (1 + len(batches)))
    for name in others:
        pair = {dense: reference, name: _converted(model, linears, formats[name])}
        tokens = torch.ones(1, prompt, dtype=torch.long, device=device)
        prefills = {n: partial(m, tokens, use_cache=False) for n, m in pair.items()}
        kinds: list[Any] = [("prefill", 1, prompt, prefills, lambda _: 1)]
        for b in batches:
            decodes = {n: _decode(m, b, new_tokens, device, seconds) for n, m in pair.items()}
            kinds.append(("decode", b, b, decodes, _new_tokens))
        for what, batch, count, runs, often in kinds:
            times = time_in_turns(runs, device, seconds, often)
            told = pair if name == others[0] else [name]  # the dense format once, though it is timed beside each
            found += [timing(what, batch, n, times, dense, _nbytes(pair[n]), count) for n in told]
        step(name)
    return found


def _converted(model: HuggingFaceModel, linears: Sequence[Linear], made: type[AbstractProduct]) -> PreTrainedModel:
    """Return a copy of the model whose operators are products in a format."""
    replaced = {id(module): made(weight, bias) for module, weight, bias in linears}
    copy = deepcopy(model.model, dict(replaced))  # what is in the memo is taken for the copy
    return cast(PreTrainedModel, nn.Module.to(copy, made.dtype))


def _decode(model: PreTrainedModel, batch: int, new_tokens: int, device: str, seconds: float) -> Callable[[], Tensor]:
    """Return a function that generates after a single token for about a round's share of the seconds."""
    token = torch.ones(batch, 1, dtype=torch.long, device=device)
    asked: dict[str, Any] = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens, "do_sample": False}
    asked |= {"max_time": seconds / (2 * ROUNDS), "attention_mask": token, "pad_token_id": 0}
    return partial(cast(Any, model).generate, token, **asked)


def _new_tokens(sequences: Tensor) -> int:
    return sequences.shape[1] - 1


def _nbytes(model: nn.Module) -> int:
    """Return the bytes read for a token: all weights without the embedding table, unless the table is also the head."""
    tables = [m.weight for m in model.modules() if isinstance(m, nn.Embedding)]
    head = getattr(model.get_submodule("lm_head"), "weight", None) if hasattr(model, "lm_head") else None
    read = [p for p in model.parameters() if p is head or all(p is not table for table in tables)]
    return sum(p.nbytes for p in read) + sum(m.nbytes for m in model.modules() if isinstance(m, AbstractProduct))
