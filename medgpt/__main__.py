"""python -m medgpt: the command `medgpt`."""

import sys

from medgpt.cli import main

if __name__ == "__main__":
    sys.exit(main())
