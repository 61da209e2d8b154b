"""`python -m grun`."""

from grun.cli import main
from grun.runtime import stopping

if __name__ == "__main__":
    stopping.leave(main())
