"""Start the command line."""

from baselines.llm360.options import Llm360Options
from grun.runtime import stopping

if __name__ == "__main__":
    stopping.leave(Llm360Options.main())
