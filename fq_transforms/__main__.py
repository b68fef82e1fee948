"""`python -m fq_transforms`: the command line, as `fqt`."""

import sys

from fq_transforms.cli import main

if __name__ == "__main__":
    sys.exit(main())
