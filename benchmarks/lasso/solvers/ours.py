"""convexprune: a quadratic from the data, and a solver of it."""

from benchopt import BaseSolver

from convexprune import L1, Problem, Quadratic, solve


class Solver(BaseSolver):
    """`solve` with one of our solvers; the moments and the certificate are in its time."""

    name = "convexprune"
    sampling_strategy = "tolerance"
    parameters = {"solver": ["auto", "working-set", "admm", "fista"]}

    def set_objective(self, X, y, strength):
        self.X, self.y, self.strength = X, y, strength

    def run(self, tolerance):
        problem = Problem(Quadratic.least_squares(self.X, self.y), L1(self.strength))
        self.weight = solve(problem, self.solver, tolerance=max(tolerance, 1e-15)).weight

    def get_result(self):
        return {"weight": self.weight}
