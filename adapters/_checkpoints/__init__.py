"""Models from files, layer by layer, and back."""
