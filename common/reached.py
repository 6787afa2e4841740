"""How soon each stage of a curriculum is learned: after how many of its updates the accuracy on
validation items, which is measured every --eval-every updates, first reached 90 %.

    python -m common.reached out/prosqa-mini-coconut-0 out/prosqa-mini-simcot-0
"""

import argparse
import os

from common import runtime, sheets
from common.run import read_events
from common.runtime import UserError, real


def updates_until(events, least):
    """{stage: how many updates it was trained for until a validation reached `least`, or None}. An
    accuracy counts from 0 to 1. A stage that came again is trained for longer."""
    spent, found, before = {}, {}, 0
    for event in events:
        if event["event"] == "valid" and "stage" in event:
            stage = event["stage"]
            spent[stage] = spent.get(stage, 0) + event["update"] - before
            before = event["update"]
            if event["accuracy"] >= least and found.get(stage) is None:
                found[stage] = spent[stage]
            found.setdefault(stage, None)
    return found


def rows_of(runs, least):
    """(head, rows of cells), a row for each of {label: folder}: updates_until of every stage, '-'
    where it never was, and the accuracy on the test set if the run is over. Raises UserError."""
    of_run = {label: read_events(folder) for label, folder in runs.items()}
    for label, events in of_run.items():
        if not any("stage" in event for event in events):
            raise UserError(f"{runs[label]} has no metrics.jsonl of a run; give the folder of a "
                            "run of coconut.py or simcot.py.")
    reached = {label: updates_until(events, least) for label, events in of_run.items()}
    stages = sorted({stage for found in reached.values() for stage in found})
    rows = []
    for label, events in of_run.items():
        cells = [reached[label].get(stage) for stage in stages]
        final = [f"{100 * e['test_accuracy']:.1f}" for e in events if e["event"] == "final"]
        rows.append([label, *("-" if n is None else f"{n:,}" for n in cells), *(final or ["-"])])
    title = f"updates of a stage until {100 * least:g} %"
    return [title, *(f"stage {stage}" for stage in stages), "test, %"], rows


def lines(out, found, least=0.9):
    """Lines of Markdown for --table: a line for each run. found: what tables.train_all returned."""
    runs = {}
    for name, seeds in found.items():
        runs |= {f"{name}, seed {seed}": os.path.join(out, f"{name}-{seed}") for seed in seeds}
    head, rows = rows_of(runs, least)
    return ["", "| " + " | ".join(head) + " |", "|---" * len(head) + "|",
            *("| " + " | ".join(row) + " |" for row in rows)]


def main(argv=None):
    p = argparse.ArgumentParser("python -m common.reached", description="After how many updates "
                                "of each stage the validation first reached an accuracy.")
    p.add_argument("folders", metavar="FOLDER", nargs="+", help="of a run in stages")
    p.add_argument("--least", type=real(0, 1), default=0.9, help="accuracy (default 0.9)")
    args = p.parse_args(argv)
    runs = {os.path.normpath(folder).removeprefix("out/"): folder for folder in args.folders}
    head, rows = rows_of(runs, args.least)
    sheets.show(sheets.sheet("reached", head[0], ["", *head[1:]], rows))


if __name__ == "__main__":
    runtime.run_main(main)
