"""How the house's docstrings become Google's, which griffe reads."""

import re

from griffe import Extension, Object


class House(Extension):
    """`Example:` is a section of code, not a note."""

    def on_object(self, *, obj: Object, **_: object) -> None:
        """Called by griffe for each object that it has found."""
        if obj.docstring is not None:
            obj.docstring.value = re.sub(r"^Example:$", "Examples:", obj.docstring.value, flags=re.MULTILINE)
