"""Time of a step on a pipeline of real processes, beside the least that its schedule could take.

    python benchmarks/pipeline.py [--steps 3] [--quick]

Stages that sleep run the project's step through megatron-core's schedules over gloo (see
simulated_stages.py): two passes, with all, some or no microbatches keeping their graphs,
interleaved, with uneven stages, and with both towers in one pipeline against two that take turns.
Then a small real model in two processes. Each step is compared with `pipeline/timeline.py`, fed
with the seconds that each of its ops really took (`ideal`); `formula` is the arithmetic for the
seconds that were asked for. Of the measured steps the one with the median overhead is shown. Prints
tables and writes JSON and a picture to benchmarks/results. Exit code 1 where a pipeline of sleeping
stages takes over 3% longer than its ideal. `--quick` measures two small cases and prints only.

A machine that is busy with other things wakes sleepers late, and they wait for one another: where
`overslept` is more than a percent or so, measure again.

Two pipelines that take turns have no bar: a message over gloo leaves when its receiver asks for it,
and the ideal's leave at once. Within a single pipeline this costs nothing; between towers it does.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Sequence
from typing import Any

from common import describe, environment, write_results
from pipeline_cases import BAR, Row, all_plans, compare, quick_plans, row_of
from pipeline_picture import draw
from rich.console import Console
from rich.table import Table
from simulated_stages import measure


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=3, help="measured of each case")
    parser.add_argument("--quick", action="store_true", help="two small cases, no files")
    arguments = parser.parse_args()
    console = Console(width=None if sys.stdout.isatty() else 140)

    plans = quick_plans() if arguments.quick else all_plans()
    measured = measure([plan.case for plan in plans], arguments.steps)
    rows = [row_of(plan, steps) for plan, steps in zip(plans, measured, strict=True)]
    for table, of_table in itertools.groupby(rows, key=lambda row: row.plan.table):
        print_table(console, table, list(of_table))
    comparisons = compare(rows)
    print_comparisons(console, comparisons)
    results = {
        "environment": environment(),
        "steps": arguments.steps,
        "bar": BAR,
        "rows": [row.as_dict() for row in rows],
        "towers": comparisons,
    }
    console.print(describe(results["environment"]), style="dim", highlight=False)
    if arguments.quick:
        return 0
    for path in write_results("pipeline", results, draw(rows, results)):
        print(path)
    for row in rows:
        if row.missed:
            console.print(
                f"[red]{row.plan.table}, {row.plan.name or row.plan.case}: {row.overhead:.1%} over "
                f"its ideal, above the bar of {BAR:.0%}; sleeps took {row.overslept:.1%} too long"
            )
    return 1 if any(row.missed for row in rows) else 0


# ------------------------------------------------------------------------------------- reporting


def print_table(console: Console, title: str, rows: Sequence[Row]) -> None:
    """`one pass` is what 1F1B of equal stages waits where the loss splits over microbatches:
    1 - m / (m + (P - 1) / V)."""
    table = Table(title=title, title_justify="left")
    table.add_column("")
    for column in (
        "ranks P", "microbatches m", "with graph", "formula", "ideal", "seconds", "over ideal",
        "compute", "overslept", "waiting", "one pass",
    ):  # fmt: skip
        table.add_column(column, justify="right")
    for row in rows:
        case = row.plan.case
        table.add_row(
            row.plan.name,
            *(str(count) for count in (case.ranks, case.microbatches, case.stash)),
            "" if row.formula is None else f"{row.formula:.3f}",
            f"{row.ideal:.3f}",
            f"{row.step.total:.3f}",
            f"[red]{row.overhead:.1%}" if row.missed else f"{row.overhead:.1%}",
            "" if row.compute is None else f"{row.compute:.3f}",
            "" if row.overslept is None else f"{row.overslept:.1%}",
            f"{1 - row.busy / row.step.total:.1%}",
            f"{1 - case.microbatches / (case.microbatches + (case.ranks - 1) / case.chunks):.1%}",
        )
    console.print(table)


def print_comparisons(console: Console, comparisons: Sequence[dict[str, Any]]) -> None:
    for found in comparisons:
        console.print(
            f"{found['model']} on {found['ranks']} ranks: two pipelines in turns take "
            f"{found['measured']:.3f} times as long as one, {found['by_arithmetic']:.3f} by "
            f"arithmetic; messages {found['turns_messages']} and {found['one_messages']}"
        )


if __name__ == "__main__":
    sys.exit(main())
