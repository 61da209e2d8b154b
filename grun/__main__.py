"""`python -m grun`."""

from grun.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
