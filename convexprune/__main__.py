"""`convexprune`, and `python -m convexprune`: Ctrl-C is no traceback even while the command line is being loaded."""

import os
import sys


def run() -> None:
    """Load the command line and run it; threads that wait give their processor away, which others may need."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read when torch is loaded
    try:
        from convexprune._cli import main
    except KeyboardInterrupt:
        print("Stopped.", file=sys.stderr)
        sys.exit(130)  # 128 and the number of SIGINT
    main()


if __name__ == "__main__":
    run()
