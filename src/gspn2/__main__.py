"""`python -m gspn2`."""

import sys

from .cli.main import main

sys.exit(main())
