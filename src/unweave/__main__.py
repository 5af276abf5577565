"""``python -m unweave`` is the ``unweave`` command."""

from __future__ import annotations

import sys

from unweave.cli.app import main

sys.exit(main())
