"""How results are displayed in a notebook: as a line, and the head of their table."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd

_ROWS = 12
"""The most rows of a table that are displayed."""


class Shown:
    """A result with a ``__repr__`` and a ``to_frame``."""

    def to_frame(self) -> pd.DataFrame:
        """Return the result as a table."""
        raise NotImplementedError

    def _repr_html_(self) -> str:
        frame, heading = self.to_frame(), repr(self).split("\n")[0]
        table = frame.head(_ROWS).to_html(index=False, border=0, float_format="{:.3g}".format)
        more = len(frame) - _ROWS
        rest = f"<p>{more} more rows: <code>.to_frame()</code></p>" if more > 0 else ""
        return f"<p>{escape(heading)}</p>{table}{rest}"
