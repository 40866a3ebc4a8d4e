"""`python -m nvcoll` does what the command `nvcoll` does."""

import sys

from nvcoll.cli import main

sys.exit(main())
