"""The walk over decoder layers: what enters them, what their operators see, and what is between them."""
