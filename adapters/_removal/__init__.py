"""Removals of decoder layers, experts, channels and heads, and the interface of smaller models."""
