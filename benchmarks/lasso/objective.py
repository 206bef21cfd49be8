"""A benchmark of LASSO solvers in benchopt's layout: `benchopt run benchmarks/lasso`, or `python benchmarks/lasso/table.py`.

The measure of every answer is the certified relative gap.
"""

import numpy as np
from benchopt import BaseObjective

from convexprune import L1, Problem, Quadratic, certify


class Objective(BaseObjective):
    """1/2 mean |y - V x|^2 + strength |V|_1 of one or many responses, at a share of the strength with a zero solution."""

    name = "LASSO"
    requirements = ["pip::convexprune"]
    min_benchopt_version = "1.8"
    parameters = {"divisor": [10, 100, 1000]}

    def set_data(self, X, y):
        self.X, self.y = X, y.reshape(len(y), -1)
        self.quadratic = Quadratic.least_squares(self.X, self.y)
        self.strength = float(self.quadratic.cross.abs().max()) / self.divisor

    def get_objective(self):
        return {"X": self.X, "y": self.y, "strength": self.strength}

    def evaluate_result(self, weight):
        certificate = certify(Problem(self.quadratic, L1(self.strength)), weight)
        return {
            "value": certificate.relative_gap,
            "objective": certificate.primal,
            "zeros": float((weight == 0).mean()),
        }

    def get_one_result(self):
        return {"weight": np.zeros((self.y.shape[1], self.X.shape[1]))}
