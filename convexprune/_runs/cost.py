"""The needs of a run: memory, disk and arithmetic from sizes alone, and time by the rate of products on a device."""

import os
from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import chain

import torch

from convexprune._device.precision import bare_product, widened
from convexprune._layerwise.statistics import CalibrationStatistics, in_parts
from convexprune._layerwise.steps.measure import WIDE, WIDEST
from convexprune._runs.sizes import LayerSize, ModelSize, Setting, Stack
from convexprune.core._moments import ErrorMoments
from convexprune.pruners import Cost

FLOAT = 4  # bytes: moments and problems are float32 whatever the model is
LIBRARIES = 520 << 20  # bytes of Python, torch, transformers and a tokenizer in use (measured, Linux, CPU)
KEPT = 0.35  # of the moments and the method's matrices: freed memory that the C library keeps (the same)
BOUND = {WIDE: 15.4, WIDEST: 12.3}
"""Matrices [n n] that the bound of a report needs, in float32 though it is computed in float64, by the widest input."""
HELD = 4.3  # matrices [m n] that are alive meanwhile
JUDGING, CORRECTING = 4, 8  # products for the errors that are reported, and more of them with correction (counted)
SECONDS = 0.4  # that a matrix product is timed for, in each of two dtypes
WIDTH, WIDTH_ON_GPU = 1024, 8192  # of the product that is timed, which has to be long beside what begins it


@dataclass(frozen=True)
class Memory:
    """Peak bytes by part. On a GPU all parts but the host's are there; on a CPU all parts share a memory."""

    fixed: int  # parameters outside the decoder layers
    layer: int
    moments: int
    method: int
    batch: int  # hidden states of a batch, and activations of a pass
    host: int  # main memory beside a GPU
    disk: int  # hidden states between the layers
    beside: int = 0  # further problems that a GPU solves at the same time

    @property
    def device(self) -> int:
        return self.fixed + self.layer + self.moments + self.method + self.batch + self.beside

    @property
    def all(self) -> int:
        return self.device - self.beside + LIBRARIES + round(KEPT * (self.moments + self.method))


@dataclass(frozen=True)
class Operations:
    forward: float
    gram: float
    solve: float
    judge: float  # operations for reported errors, and those of a survey times its overhead
    problems: int
    products: float  # number of matrix products [m n] x [n n]


def moments_bytes(stack: Stack, corrected: bool, of_inputs: bool = False) -> int:
    """Return the bytes of the Gram matrices of both halves and of the held-out windows, and of `ErrorMoments`."""
    m, n = stack.outputs, stack.inputs
    numbers = 2 * n * n if of_inputs or not ErrorMoments.cheaper_in_output_space(m, n) else m * n + m
    return CalibrationStatistics.bytes(n) + (2 * FLOAT * numbers if corrected else 0)


def correcting(stack: Stack) -> float:
    m, n = float(stack.outputs), float(stack.inputs)
    return 4 * m * n if ErrorMoments.cheaper_in_output_space(stack.outputs, stack.inputs) else 3 * n * n


def problem_bytes(stack: Stack, method: Cost, bound: bool = False) -> int:
    """Return the bytes of a problem: the moments of all windows, and matrices of the method or of the bound."""
    m, n = stack.outputs, stack.inputs
    solving = method.squares * n * n + (method.rectangles * m + method.apart * max(stack.heights)) * n
    squares = next((squares for widest, squares in BOUND.items() if n <= widest), None)
    bounding = (1 + squares) * n * n + HELD * m * n if bound and squares else 0
    return round(FLOAT * (n * n + max(solving, bounding)))


def memory(model: ModelSize, setting: Setting) -> Memory:
    """Return the peak: fixed parameters, a decoder layer, and the stage with the largest moments and problem."""
    method = setting.method
    peaks, crowded = [], []
    for layer in model.layers:
        for number, stage in enumerate(layer.stages):
            for part in in_parts(stage, lambda s: s.inputs):
                moments = sum(moments_bytes(s, setting.corrects(number, s), setting.input_errors) for s in part)
                moments += sum(
                    CalibrationStatistics.bytes(width) for width in {s.inputs for s in stage if not s.token_aligned}
                )
                solving = max(problem_bytes(s, method, setting.bound) for s in part)
                batch = _batch_bytes(model, layer, stage, setting)
                peaks.append((moments + max(solving, batch), moments, solving, batch))
                many = max(setting.together(s, part) * problem_bytes(s, method, setting.bound) for s in part)
                crowded.append(moments + max(many, batch))
    largest, moments, solving, batch = max(peaks)
    layers = model.itemsize * sum(layer.count * layer.parameters for layer in model.layers)
    biggest = model.itemsize * max(layer.parameters for layer in model.layers)
    tensor = model.itemsize * max(model.largest_fixed, *(layer.largest for layer in model.layers))
    return Memory(
        fixed=model.itemsize * model.fixed,
        layer=layers if model.whole else biggest,
        moments=moments,
        method=solving if solving >= batch else 0,
        batch=batch if batch > solving else 0,
        host=LIBRARIES + (model.bytes if model.whole else 2 * tensor),
        disk=_disk_bytes(model, setting, layers),
        beside=max(crowded) - largest,
    )


def work(model: ModelSize, setting: Setting) -> Operations:
    """Count the operations: passes (the dense layer once, then up to every stage; for gradients twice, and back), Gram
    matrices, products. A survey of the dense model has its own: a pass, Gram matrices, and the problems of all stages.

    Passes after the stage that ends attention begin there (`_layerwise.capture`). The stage is known only once a layer
    runs; the count assumes the first stage with a single operator as high as the hidden states are wide. This is too
    low for families without a shortcut (eager attention that returns its weights).
    """
    method, survey, tokens, seen = setting.method, setting.survey, setting.tokens, setting.surveyed * setting.length
    forward = gram = solve = judge = products = 0.0
    for layer in model.layers:
        weights = [2.0 * sum(s.share * s.outputs * s.inputs for s in stage) for stage in layer.stages]
        attention = 4.0 * setting.length * model.hidden
        passes = once = sum(weights) + attention
        alone = [n for n, stage in enumerate(layer.stages) if n and [s.heights for s in stage] == [(model.hidden,)]]
        end = min(alone, default=len(layer.stages))
        for number, stage in enumerate(layer.stages):
            if number > 0:
                again = sum(weights[end:number]) if number > end else sum(weights[:number]) + attention
                passes += len(in_parts(stage, lambda s: s.inputs)) * again
            for s in stage:
                n2 = float(s.inputs) ** 2
                corrected = correcting(s) if setting.corrects(number, s) else 0
                gram += layer.count * s.share * (tokens * (n2 + corrected) + seen * n2)
                judging = layer.count * (JUDGING + CORRECTING * setting.corrects(number, s))
                solving, surveying = (
                    n2 * (2 * s.outputs * each.products + each.factorisations * s.inputs) for each in (method, survey)
                )
                judge += 2 * s.outputs * n2 * judging
                judge += layer.count * survey.overhead * surveying if seen else 0.0
                solve += layer.count * solving
                products += layer.count * method.products + judging
        if not setting.dense_prefix:
            passes += sum(weights[end:]) if end < len(weights) else sum(weights) + attention
        forward += layer.count * (tokens * passes + (3 * setting.gradients * setting.length + seen) * once)
    forward += 2 * setting.gradients * setting.length * 2 * model.largest_fixed  # the head, and back
    problems = sum(layer.count * len(layer.stacks) for layer in model.layers)
    return Operations(forward, gram, solve, judge, problems, products)


def _batch_bytes(model: ModelSize, layer: LayerSize, stage: Iterable[Stack], setting: Setting) -> int:
    """A batch of hidden states, the layer's widest activations, and the inputs of a stage in float32, twice."""
    tokens = setting.batch * setting.length
    widest = max((s.outputs for s in layer.stacks), default=0)
    inputs = max(s.inputs for s in stage)
    return tokens * (model.itemsize * (4 * model.hidden + 3 * widest) + 3 * FLOAT * inputs)


def _disk_bytes(model: ModelSize, setting: Setting, layers: int) -> int:
    """Return the bytes of finished layers, the result, hidden states, and recorded inputs of a layer.

    Single operators may begin a shortcut for a later stage, so inputs from the pruned layer are kept as well.
    """
    hidden = model.itemsize * setting.tokens * model.hidden * (1 if setting.dense_prefix else 2)
    widths = []
    for layer in model.layers:
        kept = chain(*layer.stages[int(setting.dense_prefix) : -1])  # nothing changes a first stage that is fed densely
        single = sum(s.inputs for s in kept if s.token_aligned and len(s.heights) == 1)
        widths.append(sum(s.inputs for s in layer.stacks if s.token_aligned) + single)
    seen = model.itemsize * setting.tokens * max(widths)
    return layers + model.bytes + 2 * hidden + seen


SCALED = 1  # matrix [m n] more at the peak, if rows are weighed; what they were scaled to is gone by the next one


def cheaper(setting: Setting, light: Cost, refit: bool) -> dict[str, Setting]:
    """Return settings that need less memory, the least loss first; `light` are the needs with method SparseGPT."""
    ways: dict[str, Setting] = {}
    if setting.batch > 1:
        ways["--batch-size 1"] = replace(setting, batch=1)
    if setting.gradients:
        alike = setting.method._replace(rectangles=setting.method.rectangles - SCALED)
        ways["--allocation uniform"] = replace(setting, gradients=0, method=alike)
    if setting.correction:
        ways["--error-correction 0"] = replace(setting, correction=False)
    if setting.method.rectangles > light.rectangles:
        lighter = replace(setting, method=light, side_by_side=False)
        ways["--method sparsegpt" + (" --no-refit" if refit else "")] = lighter
        if setting.correction:
            ways["--method sparsegpt --error-correction 0"] = replace(lighter, correction=False)
    return ways


@dataclass(frozen=True)
class Speed:
    single: float  # in float32
    forward: float


def seconds(work: Operations, speed: Speed, method: Cost) -> dict[str, float]:
    return {
        "forward": work.forward / speed.forward,
        "gram": work.gram / speed.single,
        "solve": (method.overhead * work.solve + work.judge) / speed.single,
    }


def measured_speed(device: torch.device | str, dtype: torch.dtype) -> Speed:
    """Time a product in float32 and a product in the model's dtype, about a second in all."""
    single = _rate(device, torch.float32)
    return Speed(single, single if dtype == torch.float32 else _rate(device, dtype))


def _rate(device: torch.device | str, dtype: torch.dtype) -> float:
    """Return the best rate of all repeats, the nearest to the rate of an idle device."""
    from torch.utils.benchmark import Timer  # says on import that there is no GPU, on a machine with nvcc

    width = WIDTH if torch.device(device).type == "cpu" else WIDTH_ON_GPU
    a = torch.full((width, width), 0.5, dtype=dtype, device=device)
    timer = Timer("product(a, a)", globals={"a": a, "product": bare_product}, num_threads=torch.get_num_threads())
    with widened(a.device, dtype):  # as a model's are
        return 2 * width**3 / min(timer.blocked_autorange(min_run_time=SECONDS).times)


def load() -> str:
    if not hasattr(os, "getloadavg"):  # on Windows
        return "at its present load"
    return f"at its present load ({os.getloadavg()[0]:.1f} on {os.cpu_count()} cores)"
