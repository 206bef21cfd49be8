"""The functions of the top, `prune` and `permute`: what they are given, what they do, what they give back."""
