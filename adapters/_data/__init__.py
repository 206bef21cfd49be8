"""Calibration tokens: from texts, rows, the hub, or the model."""
