"""`python -m grun`."""

from grun import stopping
from grun.cli import main

if __name__ == "__main__":
    stopping.leave(main())
