"""Charts of a page: SVG, made by matplotlib when the page is; its only importer here.

Of the libraries that draw charts it is the one that needs no script in the page, nothing that is
loaded, and that is installed in most places already.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from slap_stream.errors import ConfigError
from slap_stream.report.texts import shown

# Readable on light and on dark.
COLOURS = ("#3b82f6", "#94a3b8", "#10b981", "#f59e0b", "#ef4444", "#a855f7", "#ec4899", "#14b8a6")
# Stand for the page's own colours, which depend on the reader's.
_INK, _LINE = "#010203", "#010204"
_WIDTH, _HEIGHT = 4.6, 2.6
_MOST_BARS = 16


class Chart:
    """One chart.

    Args:
        name: Tells its SVG from others of the page.
        title: What it shows, read out where it is not seen.
        x: Label of the axis.
        y: Label of the axis.
        height: In inches.

    Raises:
        ConfigError: If matplotlib is not installed.
    """

    def __init__(
        self, name: str, title: str, *, x: str = "", y: str = "", height: float = _HEIGHT
    ) -> None:
        try:
            from matplotlib import rc_context
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ConfigError(
                f"matplotlib must be installed to draw a report, got {error}; "
                "pip install 'slap-stream[report]'."
            ) from error
        # Names of sources are no formulas.
        self._style: Any = {
            "svg.fonttype": "none",
            "svg.hashsalt": name,
            "text.parse_math": False,
            "axes.formatter.use_mathtext": False,
            "font.size": 9,
            "axes.spines.top": False,
            "axes.spines.right": False,
            **dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), _INK),
            "axes.edgecolor": _LINE,
            "grid.color": _LINE,
        }
        self._context, self._name, self._title = rc_context, name, title
        with rc_context(self._style):
            self._figure = Figure(figsize=(_WIDTH, height), layout="constrained")
            self._axes: Any = self._figure.subplots()
            self._axes.set_xlabel(x)
            self._axes.set_ylabel(y)
            self._axes.grid(axis="y", linewidth=0.5)
            self._axes.set_axisbelow(True)

    def lines(self, of: Mapping[str, tuple[ArrayLike, ArrayLike]], *, dots: bool = False) -> Chart:
        """A line for each name, through (n,) x and (n,) y; the second and later ones dashed."""
        with self._context(self._style):
            for place, (name, (x, y)) in enumerate(of.items()):
                self._axes.plot(
                    x,
                    y,
                    label=shown(name, 28),
                    color=COLOURS[place % len(COLOURS)],
                    linestyle="--" if place and not dots else "-",
                    marker="o" if dots else None,
                    markersize=3,
                    linewidth=1.6,
                )
            self._legend(len(of))
        return self

    def shares(
        self, x: ArrayLike, of: Mapping[str, ArrayLike], colours: Mapping[str, str]
    ) -> Chart:
        """Areas over each other, (n,) shares each."""
        with self._context(self._style):
            heights = [np.asarray(values) for values in of.values()]
            self._axes.stackplot(
                x,
                heights,
                labels=list(of),
                colors=[colours[name] for name in of],
                linewidth=0,
                step="post",
            )
            self._axes.set_ylim(0, 1)
            self._legend(len(of))
        return self

    def bars(
        self, names: Sequence[str], of: Mapping[str, Sequence[float]], colours: Mapping[str, str]
    ) -> Chart:
        """A bar for each name, in parts laid end to end; the first ones, if there are many."""
        with self._context(self._style):
            labels = [shown(name, 24) for name in names[:_MOST_BARS]]
            left = np.zeros(len(labels))
            for part, values in of.items():
                width = np.asarray(values[:_MOST_BARS], float)
                self._axes.barh(
                    range(len(labels)), width, left=left, label=part, color=colours[part]
                )
                left += width
            self._axes.set_yticks(range(len(labels)), labels)
            self._axes.invert_yaxis()
            self._axes.grid(visible=False)
            self._legend(len(of))
        return self

    def histogram(
        self, edges: ArrayLike, counts: ArrayLike, *, log: bool = False, mark: float | None = None
    ) -> Chart:
        """Counts (n,) between (n + 1,) edges; a line at `mark`."""
        with self._context(self._style):
            self._axes.stairs(counts, edges, fill=True, color=COLOURS[0])
            if log:
                self._axes.set_xscale("log")
                # As numbers: the formatter's own writes formulas.
                self._axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
            if mark is not None:
                self._axes.axvline(mark, color=COLOURS[4], linewidth=1.2)
        return self

    def _legend(self, entries: int) -> None:
        if entries > 1:
            self._figure.legend(
                loc="outside upper left", ncols=min(3, entries), frameon=False, fontsize=8
            )

    def svg(self) -> str:
        """The chart as an element of a page, in the page's colours."""
        out = io.StringIO()
        with self._context(self._style):
            self._figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
        text = out.getvalue()
        text = text[text.index("<svg") :]
        text = re.sub(r"<(metadata|style).*?</\1>", "", text, flags=re.DOTALL)
        text = text.replace(_INK, "currentColor").replace(_LINE, "var(--line)")
        # Several charts share a page, and names in it.
        for reference in (' id="', "url(#", 'href="#'):
            text = text.replace(reference, f"{reference}{self._name}-")
        text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", text, count=1)
        text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
        title = self._title.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
        return text.replace("<svg", f'<svg role="img" aria-label="{title}"', 1)
