"""Start the command line."""

from baselines.rmu.options import RmuOptions
from grun.runtime import stopping

if __name__ == "__main__":
    stopping.leave(RmuOptions.main())
