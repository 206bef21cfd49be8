"""A run: folder, executors, identity, and needs."""
