"""`python -m drift.cli` is the command `drift`."""

import sys

from drift.cli import main

sys.exit(main())
