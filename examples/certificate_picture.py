"""Draw what a duality gap and a lower bound are, on one weight, as docs/certificates.svg (needs matplotlib).

python examples/certificate_picture.py [FILE]
"""

import sys

import torch

from convexprune import L1, Problem, Quadratic, certify


def main(file: str | None) -> None:
    # One weight: the error is a parabola, the penalty a kink, and the certificate a floor below their sum.
    error = Quadratic(torch.tensor([[1.0]]), torch.tensor([[1.2]]), torch.tensor([1.6]))
    problem = Problem(error, L1(0.6))
    grid = torch.linspace(-0.6, 2.2, 200, dtype=torch.float64)
    values = [problem.value(torch.tensor([[float(v)]])) for v in grid]
    guesses = [-0.4, 1.6, 0.75]
    floors = [certify(problem, torch.tensor([[guess]])) for guess in guesses]
    print(f"least value on the grid {min(values):.4f}")
    for guess, c in zip(guesses, floors, strict=True):
        print(f"weight {guess:5.2f}: value {c.primal:.4f}, gap {c.gap:.4f}, so no weight is below {c.dual:.4f}")
    # Two-valued world: a non-zero costs, zero is free. The largest convex function below is the relaxation.
    curvature, price = 1.0, 0.5
    weights = torch.linspace(-2, 2, 401, dtype=torch.float64)
    exact = curvature * weights.square() / 2 + price * (weights != 0)
    knee = (2 * price / curvature) ** 0.5
    relaxed = torch.where(weights.abs() <= knee, (2 * price * curvature) ** 0.5 * weights.abs(), exact)
    if file is not None:
        draw(file, (grid, values, guesses, floors), (weights, exact, relaxed, knee))
        print(f"drawn: {file}")


def draw(file, convex, pruning) -> None:
    from matplotlib import pyplot as plt

    plt.rcParams["svg.hashsalt"] = "convexprune"  # the same picture every time
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6))
    grid, values, guesses, floors = convex
    left.plot(grid, values, color="black")
    for guess, c, colour in zip(guesses, floors, ("tab:red", "tab:orange", "tab:green"), strict=True):
        left.plot([guess], [c.primal], "o", color=colour)
        left.axhline(c.dual, color=colour, lw=1, ls="--")
        left.annotate("", (guess, c.dual), (guess, c.primal), arrowprops={"arrowstyle": "<->", "color": colour})
    left.set(title="Duality gap: each guess brings its own floor", xlabel="a weight", ylabel="error + penalty")
    weights, exact, relaxed, knee = pruning
    right.plot(weights, exact, color="black", label="error of a kept weight + price of keeping it")
    right.plot([0], [0], "o", color="black")
    right.plot(weights, relaxed, color="tab:blue", ls="--", label="largest convex function below it")
    right.plot([-knee, knee], [2 * 0.5] * 2, "o", color="tab:blue", ms=4)
    right.set(title="Lower bound: a convex floor below pruning itself", xlabel="a weight")
    right.legend(loc="upper center", fontsize=8)
    figure.tight_layout()
    figure.savefig(file, metadata={"Date": None})


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else None)
