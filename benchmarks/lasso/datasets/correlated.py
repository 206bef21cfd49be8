"""Normal inputs that are correlated with their neighbours, and a sparse weight."""

import numpy as np
from benchopt import BaseDataset


class Dataset(BaseDataset):
    """`samples` of `inputs`, correlated by `correlation` to the power of the distance."""

    name = "correlated"
    parameters = {"samples, inputs, responses": [(1000, 300, 1), (1000, 300, 16)], "correlation": [0.7]}

    def get_data(self):
        rng = np.random.default_rng(0)
        x = rng.normal(size=(self.samples, self.inputs))
        for j in range(1, self.inputs):
            x[:, j] = self.correlation * x[:, j - 1] + (1 - self.correlation**2) ** 0.5 * x[:, j]
        weight = rng.normal(size=(self.inputs, self.responses)) * (rng.random((self.inputs, self.responses)) < 0.05)
        y = x @ weight
        return {"X": x, "y": y + 0.3 * y.std() * rng.normal(size=y.shape)}
