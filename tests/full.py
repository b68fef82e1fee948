"""Laws of many cases are tried in all of them with FULL=1, as `.ci/full` sets it; else in fewer, for CI's time."""

import os

FULL = os.environ.get("FULL") == "1"
