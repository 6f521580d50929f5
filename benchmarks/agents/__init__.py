"""What agents cost, and whether their episodes are exact."""

import os

from penstock.quiet import quiet_libraries

quiet_libraries(os.environ)  # before a benchmark imports a library that draws progress bars into its tables
