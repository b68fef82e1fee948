"""How the house's docstrings become Google's: what griffe reads them by."""

import re

from griffe import Extension


class House(Extension):
    """`Example:` is a section of code, not a note."""

    def on_object(self, *, obj, **kwargs):
        if obj.docstring is not None:
            obj.docstring.value = re.sub(r"^Example:$", "Examples:", obj.docstring.value, flags=re.MULTILINE)
