"""Sparse regression without any language model: state the problem, solve it, check the answer against CVXPY.

python examples/sparse_regression.py
"""

import torch

from convexprune import L1, Problem, Quadratic, certify, make_solver

torch.manual_seed(0)
tokens, inputs, outputs = 200, 30, 3
truth = torch.randn(outputs, inputs, dtype=torch.float64) * (torch.rand(outputs, inputs) < 0.2)
x = torch.randn(tokens, inputs, dtype=torch.float64)
y = x @ truth.T + 0.1 * torch.randn(tokens, outputs, dtype=torch.float64)

problem = Problem(Quadratic.least_squares(x, y), L1(0.05))  # 1/2 mean |y - V x|^2 + 0.05 sum |V|
fista = make_solver("fista", tolerance=1e-9).solve(problem)
oracle = make_solver("cvxpy", engine="CLARABEL").solve(problem)

for name, solution in {"fista": fista, "cvxpy": oracle}.items():
    certificate = certify(problem, solution.weight)
    print(f"{name}: objective {problem.value(solution.weight):.9f}, relative gap {certificate.relative_gap:.0e}")
print(f"largest difference of the weights: {(fista.weight - oracle.weight).abs().max():.1e}")
print(f"non-zeros: {int((fista.weight != 0).sum())} found, {int((truth != 0).sum())} true")
assert abs(problem.value(fista.weight) - problem.value(oracle.weight)) < 1e-8
