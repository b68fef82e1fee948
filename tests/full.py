"""Laws of many cases: with the environment variable FULL=1, as in `.ci/full`, all that a test knows, else fewer."""

import os

FULL = os.environ.get("FULL") == "1"
