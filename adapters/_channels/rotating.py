"""Turn the hidden states of a model by an orthogonal matrix in which N:M removes less; the function stays the same."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import PreTrainedModel

from convexprune._layerwise.capture import stage_inputs
from convexprune._layerwise.context import LayerContext, propagate
from convexprune._layerwise.model import Call, DecoderLayer, Group
from convexprune._layerwise.store import MemoryStore
from convexprune._layerwise.walk import LayerWalk
from convexprune._progress import begin
from convexprune.constraints import Constraint
from convexprune.core._rotation import Readers, Writers, removed, rotation
from convexprune.core._symmetric import add_square, definite_inverse, from_upper, quadratic_forms, ridged
from convexprune.errors import ModelError

from .._discovery.probing import of_each_kind
from .._huggingface import HuggingFaceModel
from .channels import Axis, Channels, NotPermutable, close, columns, hidden_channels
from .inner_channels import doubled
from .permuting import PROBE, Rotation, refuse_offloaded, stride

DAMPING = 0.05  # of Gram matrices, whose inverses give the scores


@dataclass(frozen=True)
class _Frame:
    """The axes of the hidden states, and the names of norms by parameters that read their outputs."""

    channels: Channels
    norms: Mapping[str, str]
    keeps_ones: bool  # a norm that subtracts the mean commutes with no other rotation


@contextmanager
def rotated(
    model: HuggingFaceModel, tokens: Tensor, pattern: Constraint, batch_size: int = 1, seed: int = 0
) -> Iterator[Rotation]:
    """Rotate the hidden states of a dense model in memory, in place, as learned from `tokens` [windows length].

    Weights of norms move into the operators that read their outputs, and a head that is tied to the embedding gets a
    matrix of its own. If the context raises, or the model computes something else, all is put back.
    """
    refuse_offloaded(model)
    probe = tokens[:1, :PROBE].to(model.device)
    with torch.no_grad():
        dense = model.model(probe).logits
    with _restored(model.model):
        done = _rotate(model, tokens.split(batch_size), pattern, seed)
        with torch.no_grad():
            logits = model.model(probe).logits
        if not close(dense, logits, model.model.dtype):
            raise ModelError(f"{model.name} computes something else with rotated hidden states. Leave out rotate.")
        yield done


@torch.no_grad()
def _rotate(model: HuggingFaceModel, batches: Sequence[Tensor], pattern: Constraint, seed: int) -> Rotation:
    step = begin("rotating", 1)
    try:
        frame = _frame(model)
    except NotPermutable as cause:
        raise ModelError(f"{model.name} cannot be rotated: {cause}. Leave out rotate.") from None
    blocks = _blocks(model, batches, frame, pattern)
    matrix = rotation(blocks, pattern, frame.keeps_ones, seed=seed)
    unit = torch.eye(len(matrix)).to(matrix)
    done = Rotation(len(matrix), *(float(removed(blocks, each, pattern)) for each in (unit, matrix)))
    _apply(model.model, frame, matrix)
    step(f"hidden states  {done.before:.4f} -> {done.after:.4f}")
    return done


@contextmanager
def _restored(model: PreTrainedModel) -> Iterator[None]:
    """Untie the head. If the context raises, put all parameters back, from a copy of the whole model."""
    head: Any = model.get_output_embeddings()
    tied, config = head.weight, model.config.get_text_config()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    was, config.tie_word_embeddings = config.tie_word_embeddings, False
    head.weight = nn.Parameter(tied.detach().clone(), requires_grad=False)
    try:
        yield
    except BaseException:
        head.weight, config.tie_word_embeddings = tied, was
        for name, parameter in model.named_parameters():
            parameter.data.copy_(before[name])
        raise


def _frame(model: HuggingFaceModel) -> _Frame:
    """Find the axes of the hidden states and the norms in front of them; NotPermutable is the reason against it."""
    channels, names = hidden_channels(model), [layer.name for layer in model.layers]
    routed = next((group for layer in model.layers for group in layer.groups if not group.token_aligned), None)
    if routed is not None:
        raise NotPermutable(f"{routed.operators[0].name} is behind a router, which reads the hidden states")
    parameters = {axis.parameter: model.model.get_parameter(axis.parameter) for axis in channels.axes}
    norms = {name.removesuffix(".weight") for name, p in parameters.items() if p.dim() == 1 and ".weight" in name}
    final = {norm for norm in norms if not norm.startswith(tuple(f"{name}." for name in names))}
    if len(final) != 1:
        raise NotPermutable(f"a single norm has to be between its layers and its head, not {sorted(final)}")
    head: Any = model.model.get_output_embeddings()
    front = {name: norm for norm in final for name, p in parameters.items() if p is head.weight}
    readers = of_each_kind(model, partial(_readers, norms=norms))
    consumers = {axis.parameter for axis in channels.consumers}
    for name, found in zip(names, readers, strict=True):
        front |= {at: f"{name}.{norm}" for own, norm in found.items() if (at := f"{name}.{own}") in consumers}
    odd = (norms | consumers) - {*front.values(), *front.keys()}
    if odd:
        raise NotPermutable(f"operators alone have to read its norms, and a norm has to be before each: {sorted(odd)}")
    modules = {norm: model.model.get_submodule(norm) for norm in sorted(norms)}
    dead = next((n for n, m in modules.items() if getattr(m, "bias", None) is not None and not m.weight.all()), None)
    if dead is not None:
        raise NotPermutable(f"{dead} has a bias and a weight of zero")
    keeps_ones = not all(_commutes(module, channels.size, keeps_ones=False) for module in modules.values())
    if keeps_ones and not all(_commutes(module, channels.size, keeps_ones=True) for module in modules.values()):
        raise NotPermutable("one of its norms depends on the coordinates of the hidden states")
    return _Frame(channels, front, keeps_ones)


def _readers(layer: DecoderLayer, call: Call, hidden: Tensor, norms: Collection[str]) -> dict[str, str]:
    """Return the norm by parameter of operators whose inputs are doubled exactly if the norm's outputs are."""
    found = dict[str, str]()
    for norm in (name.removeprefix(f"{layer.name}.") for name in norms if name.startswith(f"{layer.name}.")):
        axes = [Axis(f"{norm}.{name}", 0) for name, _ in layer.module.get_submodule(norm).named_parameters()]
        for stage in layer.stages:
            before = stage_inputs(layer, stage, call, hidden)
            with doubled(layer.module, axes, torch.ones(hidden.shape[-1], dtype=torch.bool)):
                after = stage_inputs(layer, stage, call, hidden)
            reading = [group for group, x in before.items() if torch.equal(2 * x, after[group])]
            found |= {columns(operator).parameter: norm for group in reading for operator in group.operators}
    return found


def _commutes(norm: nn.Module, size: int, keeps_ones: bool) -> bool:
    """Return True if the norm without its weights commutes, in float32, with a random reflection."""
    generator = torch.Generator().manual_seed(0)
    x, vector = torch.randn(8, size, generator=generator) + 1, torch.randn(size, generator=generator)
    vector = vector - vector.mean() if keeps_ones else vector
    plain = {n: torch.full(p.shape, float(n == "weight"), device=p.device) for n, p in norm.named_parameters()}
    device = next(iter(plain.values())).device
    reflection = (torch.eye(size) - 2 * vector.outer(vector) / vector.square().sum()).to(device)
    first, then = (functional_call(norm, plain, (each,)) for each in (x.to(device), x.to(device) @ reflection))
    return close(first @ reflection, then, torch.float32)


def _blocks(
    model: HuggingFaceModel, batches: Sequence[Tensor], frame: _Frame, pattern: Constraint
) -> list[Readers | Writers]:
    """Return a sample of all operators that read or write the hidden states, with the moments of their inputs."""
    step, blocks = stride(model.model, [frame.channels]), list[Readers | Writers]()
    written = {axis.parameter for axis in frame.channels.axes}

    def look(context: LayerContext) -> None:
        layer, grams = context.layer, dict[Group, Tensor]()
        with ExitStack() as hooks:
            for group in layer.groups:
                grams[group] = torch.zeros(2 * [group.operators[0].shape[1]], device=model.device)
                hooks.enter_context(group.input_hook(partial(_add, grams[group])))
            propagate(context)
        for group, triangle in grams.items():
            gram, name = from_upper(triangle), f"{layer.name}.{columns(group.operators[0]).parameter}"
            weights = [_of_unit_energy(operator.read().float(), gram) * step**0.5 for operator in group.operators]
            if name in frame.norms:
                scale = model.model.get_parameter(f"{frame.norms[name]}.weight").float()
                inner = torch.where(scale == 0, 0, 1 / scale)
                inverse = definite_inverse(ridged(inner[:, None] * gram * inner, DAMPING))
                blocks.append(Readers(torch.cat([weight[::step] for weight in weights]) * scale, inverse))
            elif name in written:
                roots = definite_inverse(ridged(gram, DAMPING)).diagonal().sqrt()
                parts = [(w / roots).unflatten(1, (-1, pattern.block))[:, ::step].flatten(1) for w in weights]
                blocks.append(Writers(torch.cat(parts, 1)))

    LayerWalk(model, batches, MemoryStore(range(len(model.layers)))).run(look)
    return blocks


def _add(gram: Tensor, x: Tensor) -> None:
    add_square(gram, x.flatten(0, -2))


def _of_unit_energy(weight: Tensor, gram: Tensor) -> Tensor:
    energy = quadratic_forms(weight, gram).sum()
    return weight / energy.clamp_min(torch.finfo(weight.dtype).tiny).sqrt()


def _apply(model: nn.Module, frame: _Frame, matrix: Tensor) -> None:
    """Give norms the weight 1, and multiply all other axes by the weight of the norm in front and by the matrix."""
    weights = {norm: model.get_parameter(f"{norm}.weight").to(matrix, copy=True) for norm in frame.norms.values()}
    for axis in (*frame.channels.axes, *frame.channels.consumers):
        parameter, (module, _, name) = axis.of(model.get_parameter(axis.parameter)), axis.parameter.rpartition(".")
        if module in weights and name == "weight":
            parameter.fill_(1)
            continue
        factor = 1 / weights[module] if module in weights else weights.get(frame.norms.get(axis.parameter, ""), 1)
        changed = (parameter.movedim(axis.dim, -1).to(matrix) * factor) @ matrix
        parameter.copy_(changed.movedim(-1, axis.dim))
