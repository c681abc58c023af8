"""Writes the table of keys into docs/configuration.md, from the descriptions in `keys.py`.

Run it by `python -m parallel_clip.config.docs docs/configuration.md`.
"""

from __future__ import annotations

import sys
from pathlib import Path

from parallel_clip.config.keys import Config
from parallel_clip.config.schema import describe_type, keys_of, show

BEGIN = "<!-- keys: written by python -m parallel_clip.config.docs -->"
END = "<!-- end of keys -->"


def key_table() -> str:
    """Every key with what it takes, its default and its meaning, as a Markdown table."""
    rows = ["| key | takes | default | meaning |", "| --- | --- | --- | --- |"]
    for path, field in keys_of(Config):
        default = "must be given" if field.is_required() else f"`{show(field.default)}`"
        rows.append(f"| `{path}` | {describe_type(field)} | {default} | {field.description} |")
    return "\n".join(rows)


def with_key_table(page: str) -> str:
    """`page` with what stands between its two markers replaced by today's table."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{key_table()}\n{END}{after}"


if __name__ == "__main__":
    target = Path(sys.argv[1])
    target.write_text(with_key_table(target.read_text(encoding="utf-8")), encoding="utf-8")
