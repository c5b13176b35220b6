"""`python -m concept_steer` is the command `concept-steer`."""

import sys

from .cli import main

sys.exit(main())
