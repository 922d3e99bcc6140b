"""`python -m prune_cli` is `prune-cli`."""

import sys

from prune_cli.cli import main

sys.exit(main())
