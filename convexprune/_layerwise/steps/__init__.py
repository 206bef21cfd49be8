"""The steps on a decoder layer: observe, remove, prune, quantize, measure, survey."""
