"""Make the real problems of `convexprune.problems` from the bundled OPT: blocks of operators and their least values.

python benchmarks/extract_problems.py convexprune/data/problems
"""

import argparse
from pathlib import Path

import torch
from safetensors.torch import save_file

from convexprune.adapters import EMBEDDED, calibration_and_held_out, load
from convexprune.core._certificate import certify
from convexprune.core._penalty import L1, Support
from convexprune.recipe import make_recipe
from convexprune.solvers import make_solver
from convexprune.validation._layer_problems import OperatorProblem, block, block_problems, operator_problems

NAMES = {
    "opt-query": "model.decoder.layers.1.self_attn.q_proj",
    "opt-output": "model.decoder.layers.2.self_attn.out_proj",
    "opt-down": "model.decoder.layers.3.fc2",
}
ROWS, COLUMNS = 4, 40


def main(folder: Path) -> None:
    recipe = make_recipe(model=str(EMBEDDED), sparsity=0.5)
    model = load(EMBEDDED, device="cpu", dtype=torch.float32)
    tokens = calibration_and_held_out("self", model, num_samples=32, max_seq_length=256, seed=0)[0]
    settings = recipe.layer_settings()
    found = dict[str, OperatorProblem]()
    operator_problems(model, tokens, settings, NAMES.values(), lambda p: found.update({p.name: p}))
    folder.mkdir(parents=True, exist_ok=True)
    for name, operator in NAMES.items():
        generator = torch.Generator().manual_seed(0)
        problem, achieved = found[operator].rows(ROWS, generator)
        quadratic, chosen = block(problem, COLUMNS, generator)
        for kind, convex in block_problems(quadratic, problem, achieved[:, chosen] != 0).items():
            solution = make_solver("scipy").solve(convex).weight
            print(name, kind, certify(convex, solution))
            q, penalty = convex.quadratic, convex.penalty
            assert q.anchor is not None
            data = {"gram": q.gram, "cross": q.cross, "energy": q.energy, "solution": solution, "anchor": q.anchor}
            data["value"] = torch.tensor(convex.value(solution), dtype=torch.float64)
            if isinstance(penalty, L1):
                data["strength"] = torch.as_tensor(penalty.strength)
            elif isinstance(penalty, Support):
                data["mask"] = penalty.mask
            path = folder / f"{name}-{kind.lower()}.safetensors"
            save_file({key: tensor.contiguous() for key, tensor in data.items()}, path)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="where to write them")
    main(parser.parse_args().folder)
