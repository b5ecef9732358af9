"""Entry point of `python -m megashear` and `torchrun -m megashear`."""

import sys

from megashear.cli import main

sys.exit(main())
