"""The table of docs/experts.md: experts removed from two small mixtures that are trained here, by score and with refit.

    python benchmarks/experts.py --train wikitext2-test-raw.txt --text wikitext2-valid.txt --kinds shared,plain --share 0.25

Texts are read byte by byte. The mixtures are kept in MODELS and trained once, some minutes each on one thread. The first
windows of the second text are for calibration and for judging, others for the divergence from dense. For mixtures with
few enough choices, the error of a block without the experts chosen is put beside the least of all choices.
"""

import argparse
from collections.abc import Sequence
from itertools import combinations
from math import comb
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import MixtralConfig, MixtralForCausalLM, PreTrainedModel, Qwen2MoeConfig, Qwen2MoeForCausalLM

import convexprune
from convexprune.adapters import HuggingFaceModel, load
from convexprune.adapters._removal.experts import find_experts, small_blocks
from convexprune.adapters._removal.mixtures import Judged, chosen, recording
from convexprune.constraints import Experts

WINDOW, CALIBRATION, JUDGING, EVALUATION = 128, 72, 32, 64  # tokens, and windows
AFTER = 200_000  # where the text to evaluate on begins
FEW = 100  # choices that are all tried
STEPS, BATCH, RATE = 900, 16, 2e-3
VARIANTS = (("reap", None), ("reap", True), ("convex", False), ("convex", None))


def untrained(kind: str) -> PreTrainedModel:
    """A mixture with random weights: "plain", or "shared", with an expert for all tokens."""
    torch.manual_seed(0)
    common: dict[str, Any] = dict(
        vocab_size=256, hidden_size=128, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=4,
        max_position_embeddings=256, num_experts_per_tok=2, output_router_logits=True, router_aux_loss_coef=0.01,
        bos_token_id=0, eos_token_id=0, tie_word_embeddings=True, intermediate_size=192,
    )  # fmt: skip
    if kind == "plain":
        return MixtralForCausalLM(MixtralConfig(**common, num_local_experts=8))
    common |= {"moe_intermediate_size": 96, "shared_expert_intermediate_size": 96, "num_experts": 16}
    return Qwen2MoeForCausalLM(Qwen2MoeConfig(**common, norm_topk_prob=True))


def train(kind: str, tokens: Tensor, folder: Path, steps: int) -> None:
    """Fit a mixture to the next byte, and save it."""
    model = untrained(kind)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.01, betas=(0.9, 0.95))
    drawing = torch.Generator().manual_seed(0)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = RATE * min(1, (step + 1) / 50) * max(0.05, 1 - step / steps)
        begins = torch.randint(0, len(tokens) - WINDOW, (BATCH,), generator=drawing)
        batch = torch.stack([tokens[at : at + WINDOW] for at in begins])
        loss = model(batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    model.config.output_router_logits = False
    model.eval().save_pretrained(folder)


@torch.no_grad()
def against_the_best(folder: Path, windows: Tensor, counts: Sequence[int]) -> None:
    """Print, for each layer, the error of a block without some experts over that of the best choice."""
    model = load(folder, device="cpu", dtype=torch.float32)
    assert isinstance(model, HuggingFaceModel)
    size = find_experts(model, Experts(0.25)).size
    for count in (count for count in counts if comb(size, count) <= FEW):
        found = find_experts(model, Experts(count / size))
        smaller = small_blocks(model, found.place, found.mixtures, size - count)
        for mixture, small in zip(found.mixtures, smaller, strict=True):
            block = model.model.get_submodule(mixture.block)
            with recording(block) as inputs:
                for window in windows.split(1):
                    model.forward(window)
            judged = Judged(mixture, block, small, inputs)
            best = min(judged.error(each) for each in combinations(range(size), count))
            told = (f"{name} {judged.error(chosen(judged, name, count)) / best:.3f}" for name in ("reap", "output"))
            print(
                f"{folder.name}: {count} of {size}, {mixture.layer}: {', '.join(told)} of the least error", flush=True
            )


def main() -> None:
    """See above."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--kinds", default="shared,plain")
    parser.add_argument("--share", type=float, default=0.25)
    parser.add_argument("--counts", default="1,2,3,4")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--models", type=Path, default=Path("mixtures"))
    asked = parser.parse_args()
    torch.set_num_threads(1)
    tokens = torch.tensor(list(asked.text.read_bytes()))
    calibration = tokens[: (CALIBRATION + JUDGING) * WINDOW].view(-1, WINDOW)
    evaluation = tokens[AFTER : AFTER + EVALUATION * WINDOW].view(-1, WINDOW)
    for kind in asked.kinds.split(","):
        if not (asked.models / kind).is_dir():
            train(kind, torch.tensor(list(asked.train.read_bytes())), asked.models / kind, asked.steps)
        for method, refit in VARIANTS:
            report = convexprune.prune(
                asked.models / kind, method=method, pattern="experts", sparsity=asked.share, refit=refit,
                dataset=calibration, num_calibration_samples=CALIBRATION, held_out_samples=JUDGING,
                evaluation=evaluation, bound_rows=0, threads=1, device="cpu", batch_size=8,
            ).report  # fmt: skip
            name, (before, after) = next(iter((report.narrowed or {}).items()))
            then = "nothing" if refit is False or (method == "reap" and not refit) else "refit"
            found = report.perplexity["pruned"]
            print(f"{kind}: {name} {before} -> {after}, {method} + {then}: KL {found['kl']:.4f}", flush=True)
        against_the_best(asked.models / kind, calibration[:32], [int(each) for each in asked.counts.split(",")])


if __name__ == "__main__":
    main()
