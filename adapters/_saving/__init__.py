"""Results written as ordinary checkpoints, and read again to see that they hold what was pruned."""
