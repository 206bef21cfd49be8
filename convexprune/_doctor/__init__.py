"""Checks of a machine: one command measures what a run needs and names the failures."""
