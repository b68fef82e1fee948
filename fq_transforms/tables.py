"""Rows as columns of text, and as HTML whose styles are its own: what all tables are printed by."""

from collections.abc import Collection, Sequence
from html import escape

__all__ = ["html", "preformatted", "table"]

# Notebooks, nbconvert and the site have different styles for tables; those on the element itself win over all.
_TABLE = "border-collapse:collapse;width:auto;font:0.85em/1.5 monospace;margin:0 0 0.5em"
_CELL = "border:0;padding:0 1.2em 0 0;white-space:nowrap;text-align:"
_HEAD = "font-weight:bold;border-bottom:1px solid;"


def table(rows: Sequence[Sequence[str]], *, left: Collection[int] = (0,)) -> str:
    """Rows in columns, aligned to the right but for some.

    Example:
        >>> print(table([("format", "weights"), ("FP8", "12")]))
        format  weights
        FP8          12
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = (
        "  ".join(
            cell.ljust(w) if i in left else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )
    return "\n".join(line.rstrip() for line in lines)


def html(
    rows: Sequence[Sequence[str]],
    *,
    left: Collection[int] = (0,),
    heads: Collection[int] = (0,),
    below: Sequence[str] = (),
) -> str:
    """The same as an HTML table, for notebooks: `heads` are the rows that are headers, `below` lines of text.

    Example:
        >>> html([("format", "weights"), ("<b>", "12")], below=["all"]).count("<td")
        2
    """
    lines = [
        "".join(
            f"<{tag} style='{_CELL}{'left' if i in left else 'right'};{_HEAD * (tag == 'th')}'>{escape(cell)}</{tag}>"
            for i, cell in enumerate(row)
        )
        for tag, row in (("th" if number in heads else "td", row) for number, row in enumerate(rows))
    ]
    inside = "".join(f"<tr>{line}</tr>" for line in lines)
    text = "<br>".join(map(escape, below))
    return (
        f"<div style='overflow-x:auto'><table style='{_TABLE}'><tbody>{inside}</tbody></table>"
        f"<p style='font:0.85em/1.5 monospace;margin:0'>{text}</p></div>"
    )


def preformatted(text: str) -> str:
    """Text of several tables as HTML, for notebooks, whose own style of it may not be monospaced.

    Example:
        >>> preformatted("a < b").count("&lt;")
        1
    """
    return f"<pre style='font:0.85em/1.5 monospace;overflow-x:auto'>{escape(text)}</pre>"
