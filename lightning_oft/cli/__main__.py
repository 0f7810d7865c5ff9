"""`python -m lightning_oft.cli`, where the console script is not on the path."""

import sys

from lightning_oft.cli import main

sys.exit(main())
