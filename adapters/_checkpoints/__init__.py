"""Files of a checkpoint: the place of each tensor, checksums, and models that are refused before any work."""
