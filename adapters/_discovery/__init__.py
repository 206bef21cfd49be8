"""Discovery of a decoder layer's operators, by watching the layer run."""
