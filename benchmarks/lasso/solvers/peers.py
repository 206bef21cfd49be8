"""scikit-learn with and without a Gram matrix, celer and skglm, response by response, warm and cold alike."""

import warnings

import numpy as np
from benchopt import BaseSolver


class Solver(BaseSolver):
    """A `Lasso` estimator of a peer."""

    name = "peer"
    sampling_strategy = "tolerance"
    requirements = ["pip::scikit-learn", "pip::celer", "pip::skglm"]
    parameters = {"library": ["scikit-learn", "scikit-learn-gram", "celer", "skglm"]}

    def set_objective(self, X, y, strength):
        self.X, self.y, self.strength = np.asfortranarray(X), y, strength
        self.run(1e-3)  # numba compiles

    def run(self, tolerance):
        given = {"alpha": self.strength, "tol": max(tolerance, 1e-15), "fit_intercept": False}
        if self.library == "celer":
            from celer import Lasso
        elif self.library == "skglm":
            from skglm import Lasso
        else:
            from sklearn.linear_model import Lasso

            gram = self.library == "scikit-learn-gram" and self.X.T @ self.X
            given |= {"precompute": gram, "max_iter": 100_000}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.weight = np.stack([Lasso(**given).fit(self.X, column).coef_ for column in self.y.T])

    def get_result(self):
        return {"weight": self.weight}
