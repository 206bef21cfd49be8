"""`convexprune`, and `python -m convexprune`: Ctrl-C is no traceback even while the command line is being loaded."""

import os
import sys


def run() -> None:
    """Load the command line and run it."""
    if sys.stdout is None:  # closed: what is printed goes nowhere, and not into the next file that is opened
        sys.stdout = os.fdopen(os.open(os.devnull, os.O_WRONLY), "w")
    if "OMP_WAIT_POLICY" not in os.environ:  # where cores are busy, threads that spin longer lose minutes
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    try:
        os.getcwd()
    except FileNotFoundError:
        print("The current folder was removed. Change to another one (cd).", file=sys.stderr)
        sys.exit(2)
    try:
        from convexprune._cli import main
    except KeyboardInterrupt:
        print("Stopped.", file=sys.stderr)
        sys.exit(130)  # 128 and the number of SIGINT
    main()


if __name__ == "__main__":
    run()
