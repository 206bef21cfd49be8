"""The walk over decoder layers, and the pipeline of steps on a layer."""
