"""`convexprune`, and `python -m convexprune`: Ctrl-C is no traceback even while the command line is being loaded."""

import sys


def run() -> None:
    """Load the command line and run it."""
    try:
        from convexprune._cli import main
    except KeyboardInterrupt:
        print("Stopped.", file=sys.stderr)
        sys.exit(130)  # 128 and the number of SIGINT
    main()


if __name__ == "__main__":
    run()
