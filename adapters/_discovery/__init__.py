"""Decoder layers of a model, their operators and calls, discovered by watching the model run."""
