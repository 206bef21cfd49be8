"""The public functions `prune` and `permute`: arguments, work, results."""
