"""Baselines that anyone can reproduce, and the study of staleness."""

import os

from penstock.quiet import quiet_libraries

quiet_libraries(os.environ)  # before a benchmark imports a library that draws progress bars into its tables
