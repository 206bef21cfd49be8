"""The Gram matrix of an operator of a language model, as data with exactly these moments."""

import numpy as np
import torch
from benchopt import BaseDataset

from convexprune import Moments, adapters


class Dataset(BaseDataset):
    """The first `rows` of an operator of the second layer, or all if 0: its outputs are the responses."""

    name = "gram"
    parameters = {"model": ["bundled"], "operator": ["self_attn.q_proj", "fc1", "fc2"], "rows": [16]}

    def get_data(self):
        place = str(adapters.EMBEDDED) if self.model == "bundled" else self.model
        model = adapters.load(place, device="cpu", dtype=torch.float32)
        tokens = adapters.calibration_and_held_out("self", model, num_samples=16, max_seq_length=256, seed=0)[0]
        module = model.layers[1].module.get_submodule(self.operator)
        moments = Moments(module.weight.shape[1], torch.float64)
        hook = module.register_forward_pre_hook(lambda _, given: moments.add(given[0].flatten(0, -2).double()))
        with torch.no_grad():
            model.model.base_model(input_ids=tokens, use_cache=False)
        hook.remove()
        weight = module.weight[: self.rows or None].double().detach()
        values, vectors = np.linalg.eigh(moments.reconstruction(weight).gram.numpy())
        x = (np.sqrt(values.clip(0) * len(values)) * vectors).T  # x' x / n is the Gram matrix
        return {"X": np.asfortranarray(x), "y": x @ weight.numpy().T}
