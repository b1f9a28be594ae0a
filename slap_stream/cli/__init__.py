"""Command lines: arguments in, one call of `convert`, `embed` or `report`, a line of JSON out.

convert.py       slap-convert
embed.py         slap-embed
report.py        slap-report
command_line.py  arguments that are checked, errors of one line
"""

from __future__ import annotations

EXPORTS: dict[str, tuple[str, ...]] = {}
