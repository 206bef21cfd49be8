"""Baselines beside the numbers that their authors' code gives on the same inputs.

The numbers were computed on 29 November 2026 by the classes and functions below, in float32 on a CPU. Settings are the
authors' defaults, but for those that are named. `inputs` makes the same weights and tokens on every machine.

gptq: IST-DASLab/gptq 2d65066, `GPTQ.fasterquant(groupsize=32, actorder=True, static_groups=True)`, symmetric, mse
gptaq: Intelligent-Computing-Lab-Yale/GPTAQ 883afc6, `GPTAQ.fasterquant`, likewise, with the scales of IST-DASLab/gptq
qep: FujitsuResearch/qep 344329a, `Helper.run_weight_correct(percdamp=1, perccorr=.5)`, then the line of gptq
rtn: IST-DASLab/gptq 2d65066, `Quantizer.quantize`, groups of 32
sparsegpt: IST-DASLab/sparsegpt 147d215, `SparseGPT.fasterprune`, at 255/512: its `<=` prunes one more in each block
wanda, magnitude: locuslab/wanda 8e8fc87, `prune_wanda`; `prune_magnitude`, at 319/640: its `<=` prunes one more
alps: mazumder-lab/ALPS 8af9e6b, `ALPS_prune.ALPS_admm`
osscar: mazumder-lab/OSSCAR 0bd7887, `OSSCAR_fastprune`, `OSSCAR_local_search(num_swap=a tenth, switch_lb=1 / blocks)`
wanda-sp: CASIA-IVA-Lab/FLAP 3bb57db, `prune_wanda_sp`
owl: luuyin/OWL dddb7a4, `check_outlier_mean`, and the lines of `prune_wanda_outlier` behind it
shortgpt: icip-cas/ShortGPT 9a2ee8d, `ShortGPT.compute_bi` on the bundled OPT, divided by the number of tokens
reap: CerebrasResearch/reap 1970473, `update_pruning_state(renormalize_router_weights=True)`
fistapruner: no code was published; a reconstruction in float64 from the equations of arXiv 2408.03728 and its reviews
"""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from convexprune.adapters import EMBEDDED, HuggingFaceModel, load
from convexprune.adapters._removal.experts import find_experts
from convexprune.adapters._removal.mixtures import Judged
from convexprune.adapters._removal.shortening import influences
from convexprune.constraints import (
    Columns,
    Constraint,
    Experts,
    Grid,
    Quantized,
    SemiStructured,
    Unstructured,
    _codebook,
)
from convexprune.core._allocation import allocate_by_outliers, share_of_outliers
from convexprune.core._moments import Moments
from convexprune.pruners import (
    ALPS,
    OSSCAR,
    AbstractPruner,
    FISTAPruner,
    LayerEdit,
    LayerProblem,
    Magnitude,
    SparseGPT,
    Wanda,
    WandaSP,
)
from convexprune.quantizers import GPTAQ, GPTQ, QEP, AbstractQuantizer, Nearest

ROWS, COLUMNS, TOKENS = 4, 160, 600


def numbers(*shape: int, seed: int) -> Tensor:
    """Return numbers in (-.5, .5) that are the same on every machine: a cubic of whole numbers, modulo a prime."""
    k = torch.arange(torch.Size(shape).numel()) + 20011 * seed + 1
    return (((7 * k + 11) * k + 5) * k % 1000003).double().reshape(shape) / 1000003 - 0.5


def inputs(m: int = ROWS, n: int = COLUMNS) -> tuple[Tensor, Tensor, Tensor]:
    """Return W [m n], and the tokens x and x* [tokens n] that the operator sees in the dense and the pruned model."""
    scales = (2 * numbers(n, seed=1)).exp()
    dense = (numbers(TOKENS, n, seed=2) @ (torch.eye(n).double() + 0.3 * numbers(n, n, seed=3))) * scales
    return numbers(m, n, seed=5), dense, dense + 0.15 * numbers(TOKENS, n, seed=4) * scales + 0.1 * dense.roll(1, 1)


def posed(pattern: Constraint, correction: float = 0.0, n: int = COLUMNS) -> LayerProblem:
    weight, dense, pruned = inputs(n=n)
    moments = Moments(n, torch.float64)
    moments.add(pruned, dense)
    return LayerProblem(weight, moments, pattern, correction)


def summary(weight: Tensor) -> tuple[list[float], list[float]]:
    """Return the mask's and the weight's products with fixed numbers, row by row."""
    probe = numbers(weight.shape[1], seed=6)
    return ((weight != 0).double() @ probe).tolist(), (weight.double() @ probe).tolist()


def untouched(problem: LayerProblem) -> LayerEdit:
    return LayerEdit(problem.weight, torch.ones_like(problem.weight, dtype=torch.bool))


HALF, TWO_OF_FOUR, CHANNELS, BLOCKS = Unstructured(0.5), SemiStructured(2, 4), Columns(0.5), Columns(0.5, block=4)
PRUNED: dict[str, tuple[AbstractPruner, Constraint, list[float], list[float]]] = {
    "sparsegpt, half": (
        SparseGPT(),
        HALF,
        [-0.93459, -0.65912, -4.07386, -2.49226],
        [1.00274, -0.544977, -0.466637, 0.521245],
    ),
    "sparsegpt, 2:4": (
        SparseGPT(),
        TWO_OF_FOUR,
        [-0.50613, 3.16702, -3.11708, -2.14852],
        [0.361092, -0.621356, -0.153395, 0.894965],
    ),
    "wanda, half": (
        Wanda(),
        Unstructured(0.5, "row"),
        [-0.83727, -0.44609, -3.27368, -0.15684],
        [0.898206, 0.201235, -0.702582, 0.650748],
    ),
    "wanda, 2:4": (
        Wanda(),
        TWO_OF_FOUR,
        [-1.27583, 0.05044, -1.02409, 0.58203],
        [0.676196, 0.0295474, 0.196747, -0.637242],
    ),
    "magnitude, half": (
        Magnitude(),
        HALF,
        [-1.19907, -1.4036, -3.80996, -1.65577],
        [0.495258, 0.673037, -0.544555, 0.220171],
    ),
    "magnitude, 2:4": (
        Magnitude(),
        TWO_OF_FOUR,
        [-5.81492, -3.09836, -3.72864, -2.94908],
        [0.283072, 0.89412, -0.427504, -0.779836],
    ),
    "alps, half": (
        ALPS(),
        HALF,
        [-2.20982, -2.28162, -4.19728, -1.30914],
        [0.067099, -0.412473, -0.677246, 0.322778],
    ),
    "alps, 70 %": (
        ALPS(),
        Unstructured(0.7),
        [0.24591, -2.15192, -1.34559, 0.41019],
        [0.898719, -0.681612, 0.218915, 0.809996],
    ),
    "alps, 2:4": (
        ALPS(),
        TWO_OF_FOUR,
        [-1.26541, -4.0515, -3.46798, 0.84651],
        [1.03821, 0.606518, -0.0689478, 0.953973],
    ),
    "obs": (OSSCAR(exchanged=0), CHANNELS, [-0.30834] * 4, [1.35008, -0.370138, 0.312428, 1.19527]),
    "osscar": (OSSCAR(), CHANNELS, [-0.76741] * 4, [0.972244, -0.399082, -0.110874, 0.872624]),
    "obs, blocks": (OSSCAR(exchanged=0), BLOCKS, [-4.32164] * 4, [-0.665399, 0.658489, -0.198615, 2.04342]),
    "osscar, blocks": (OSSCAR(), BLOCKS, [-4.43399] * 4, [-0.567477, 0.251131, -0.354263, 1.79664]),
}
"""The method, its pattern, and `summary` of the authors' weight."""
QUANTIZED: dict[str, tuple[AbstractQuantizer, float, list[float], list[float]]] = {
    "gptq": (GPTQ(), 0.0, [-4.62637, -6.46277, -4.09061, -3.2878], [-0.264817, 1.17861, -0.476484, 0.121243]),
    "gptaq": (GPTAQ(), 0.25, [-4.84961, -5.53578, -4.11371, -4.08278], [-0.179193, 1.2342, -0.513741, 0.223866]),
    "qep": (QEP(), 0.5, [-5.22951, -4.28455, -4.2042, -3.64786], [-0.0120291, 0.936758, -0.154616, 0.128891]),
}
"""The quantizer, its error correction, and `summary` of the authors' weight."""
NEAREST = {4: (0.00473415, 0.00437544, 0.00417994), 3: (0.020974, 0.0195859, 0.0203703)}
"""By bits, the relative squared errors of the authors' weights: symmetric; symmetric, mse; with zero points."""


@pytest.mark.parametrize("name", PRUNED)
def test_pruners(name: str):
    pruner, pattern, masks, values = PRUNED[name]
    found = summary(pruner.prune(posed(pattern)).weight)
    assert found == (pytest.approx(masks, abs=1e-5), pytest.approx(values, abs=2e-5))


@pytest.mark.parametrize("name", QUANTIZED)
def test_quantizers(name: str, monkeypatch: pytest.MonkeyPatch):
    """The authors' scales are not rounded."""
    monkeypatch.setattr(_codebook, "rounded_scale", lambda scale: scale)
    quantizer, correction, masks, values = QUANTIZED[name]
    problem = posed(Quantized(Unstructured(0.0), Grid(4, 32)), correction)
    found = summary(quantizer.quantize(problem, untouched(problem)).weight)
    assert found == (pytest.approx(masks, abs=1e-5), pytest.approx(values, abs=2e-5))


@pytest.mark.parametrize("bits", NEAREST)
def test_rounding_to_nearest_is_no_weaker_than_the_authors(bits: int):
    problem = posed(Quantized(Unstructured(0.0), Grid(bits, 32)))
    off = Nearest().quantize(problem, untouched(problem)).weight - problem.weight
    assert float(off.square().sum() / problem.weight.square().sum()) < min(NEAREST[bits])


def test_wanda_sp():
    kept = [0, 3, 6, 7, 10, 11, 14, 18, 19, 20, 22, 23, 24, 25, 26, 30, 33, 34, 37, 38, 39, 41, 43, 44, 45, 46, 49]
    kept += [50, 51, 52, 56, 58, 60, 62, 63, 64, 65, 68, 71, 72, 75, 76, 77, 78, 80, 81, 84, 85, 87, 88, 89, 90, 92]
    kept += [94, 96, 99, 100, 104, 106, 110, 112, 115, 119, 123, 124, 127, 131, 137, 139, 140, 141, 142, 144, 150]
    kept += [152, 153, 154, 155, 157, 159]
    assert WandaSP().prune(posed(CHANNELS)).mask[0].nonzero().flatten().tolist() == kept
    heads = WandaSP().prune(posed(Columns(0.5, block=128), n=512)).mask[0, ::128]
    assert heads.nonzero().flatten().tolist() == [0, 2]


def test_owl():
    sizes = posed(HALF).scale
    weights = [numbers(8, COLUMNS, seed=10 + i) ** (2 * i + 1) for i in range(4)]
    found = allocate_by_outliers(
        [share_of_outliers(w.abs() * sizes) for w in weights], [w.numel() for w in weights], 0.7
    )
    assert found == pytest.approx([1 - kept for kept in (0.210649, 0.279221, 0.339481, 0.370649)], abs=1e-6)


def test_shortgpt():
    tokens = (torch.arange(256) * 37 % 2000 + 5).view(4, 64)
    found = influences(load(EMBEDDED, device="cpu", dtype=torch.float32), tokens, list)
    assert found == pytest.approx([1.08584106, 0.11131106, 0.05415656, 0.15782899], abs=1e-5)


@torch.no_grad()
def test_reap():
    sizes: dict[str, Any] = {
        "hidden_size": 16,
        "moe_intermediate_size": 8,
        "intermediate_size": 8,
        "vocab_size": 64,
        "head_dim": 8,
    }
    counts: dict[str, Any] = {
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "num_experts": 6,
    }
    config = Qwen3MoeConfig(num_experts_per_tok=2, norm_topk_prob=True, **sizes, **counts)
    model = HuggingFaceModel(Qwen3MoeForCausalLM(config).eval())
    mixture = find_experts(model, Experts(1 / 6)).mixtures[0]
    block = model.model.get_submodule(mixture.block)
    x, router = 4 * numbers(60, 16, seed=11).float(), numbers(6, 16, seed=12)
    up, down = numbers(6, 16, 16, seed=13), numbers(6, 16, 8, seed=14)
    parts = {"gate.weight": router, "experts.gate_up_proj": up, "experts.down_proj": down}
    for number in range(6):
        one = f"experts.{number}."
        parts |= {f"{one}gate_proj.weight": up[number, :8], f"{one}up_proj.weight": up[number, 8:]}
        parts[f"{one}down_proj.weight"] = down[number]
    for name, tensor in block.state_dict().items():
        tensor.copy_(parts[name])
    judged = Judged(mixture, block, block, [((x[None],), {})])
    expected = [1.23761, 1.33529, 1.11136, 1.2695, 1.38766, 1.50144]
    assert [judged.reap(number) for number in range(6)] == pytest.approx(expected, rel=1e-4)


def test_fistapruner():
    """The paper does not say how the step is found; ours is 1 % shorter than 1 / L."""
    pruner = FISTAPruner(strength=1.0, largest_strength=100.0, patience=8)
    found = pruner.prune(posed(HALF))
    masks, values = summary(found.weight)
    assert len(found.solutions) == 9 and masks == pytest.approx([-1.88468, -3.22406, -5.64077, -2.52807], abs=1e-5)
    assert values == pytest.approx([1.3025, -0.72272, -0.414046, 0.37434], abs=2e-3)
