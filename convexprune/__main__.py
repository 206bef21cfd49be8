"""`python -m convexprune`."""

from convexprune.cli import main

main()
