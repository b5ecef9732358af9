"""`python -m megashear`: the command line, for launchers that start modules (torchrun -m megashear)."""

import sys

from megashear.cli import main

sys.exit(main())
