"""How the house's docstrings become Google's, which griffe reads."""

import re
from pathlib import Path

from griffe import Extension, Object

DOCS = Path(__file__).parent


def link(match: re.Match[str]) -> str:
    """Of a page that a docstring names, as it is seen from a page of docs/api."""
    name = match[1]
    if not (DOCS / f"{name}.md").exists():
        raise FileNotFoundError(f"a docstring names docs/{name}, which is no page")
    return f"[docs/{name}](../../{name}/)"


class House(Extension):
    """`Example:` is a section of code, not a note, and docs/name is a link."""

    def on_object(self, *, obj: Object, **_: object) -> None:
        """Called by griffe for each object that it has found."""
        if obj.docstring is not None:
            text = re.sub(r"^Example:$", "Examples:", obj.docstring.value, flags=re.MULTILINE)
            obj.docstring.value = re.sub(r"(?<![\w/`])docs/([a-z-]+)(?:\.md)?", link, text)
