"""The command line as a module: `python -m flux_batch`."""

import sys

from flux_batch.cli import main

if __name__ == "__main__":
    sys.exit(main())
