"""`python -m convexprune`."""

from convexprune._cli import main

main()
