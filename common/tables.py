"""--table: every row of a paper's table for every seed, trained, resumed and rendered."""

import argparse
import json
import math
import os

import numpy as np

from common import runtime, settings, weights
from common.battery import p_cell
from common.evaluation import distance_cells, print_cut, print_pairs
from common.files import write_text
from common.run import progress_bar, read_events
from common.runtime import UserError
from common.scoring import wilson


OF_BATTERY = ("changed", "p", "distance_item", "distance_across")    # not in older tables


def train_all(flags, variants, n_seeds, updates, run):
    """Train every variant for every seed, as far as --out does not hold them already.

    variants: {name: the settings that make it}, where {seed} in a path is filled in. n_seeds: if
    --seeds is not typed. updates: of a run.
    run(flags, typed, bar) trains. Returns {name: {seed: what run returned}}, or None if stopped.
    """
    read_tables(flags.beside)                    # a bad file is found before training
    found, whole = {name: {} for name in variants}, 0
    seeds = range(flags.seed, flags.seed + (flags.seeds or n_seeds))
    with progress_bar(updates * len(variants) * len(seeds)) as bar:
        for name, changed in variants.items():
            for seed in seeds:
                bar.set_description(f"{name}, seed {seed}")
                out = os.path.join(flags.out, f"{name}-{seed}")
                begun = os.path.exists(os.path.join(out, "last.pt"))
                one = vars(flags) | dict(seed=seed, out=out)
                one |= dict(resume=True if begun and not flags.overwrite else None, overwrite=True)
                for key, value in changed.items():
                    one[key] = value
                    if isinstance(value, str):
                        one[key] = value.format(out=flags.out, seed=seed)
                # typed or not, all settings must be those of a run that goes on, but for those
                # that it has found out: the dtype, and what --init X brings
                found_out = {"dtype"}
                if one["init"] != "scratch":
                    found_out |= set(settings.FROM_SCRATCH)
                typed = {name: value for name, value in one.items()
                         if name not in found_out and value is not None}
                rows = run(argparse.Namespace(**one), typed, bar)
                if rows is None:
                    return None
                found[name][seed] = rows
                whole += updates
                bar.update(whole - bar.n)         # what a resumed run had done before
    return found


def with_teachers(names, known):
    """{name: settings} of some rows of a table, `teacher` first if some distill from it."""
    variants = {name: known[name] for name in names}
    if any("teacher" in {name, *changed} for name, changed in variants.items()):
        return dict(teacher=known["teacher"]) | variants
    return variants


def train_and_write(script, flags, variants, n_seeds, updates, run, replaced, thinking, write_json,
                    floors=None, curves=None):
    """--table: train all variants, then write_table. n_seeds: without --seeds.

    run returns the test rows of a run: those of its result, which is first, or of the stages up to
    it. Below the variants of `thinking` come the rows of the battery, where they have thoughts:
    replaced(path) gives those of a checkpoint, see battery.all_rows. curves: a function that gives
    further lines, as validation does. Returns the rows, or None if stopped."""
    found = train_all(flags, variants, n_seeds, updates, run)
    if found is None:
        return None
    rows = []
    for name, by_seed in found.items():
        lines = {}
        for seed, of_run in by_seed.items():
            result, *further = of_run[-1:] if "stage" in of_run[0] else of_run
            tested = name in thinking and replaced(f"{flags.out}/{name}-{seed}/best.pt")
            own, *others = tested or [{}]
            lines[seed] = [[result | own, *further], *([row] for row in others)]
        for line in zip(*lines.values()):
            rows.append(table_row(name, dict(zip(lines, line)), updates))
    write_table(script, flags, rows, updates, write_json, floors,
                curves(flags.out, found) if curves else ())
    return rows


def table_row(method, found, updates):
    """A row of table.json from the test rows {seed: [row, ..]} of each run. The first row of a run
    is its result; the others, of its other test sets or of its teacher, are further columns.

    So are the columns {title: share} that the first row of each run may have.

    accuracy (%, of each seed), mean, std; interval (%): Wilson's of the questions of all seeds
    together; thoughts, changed (%) and p (of each seed): see battery.measure."""
    runs = list(found.values())
    first, more = [rows[0] for rows in runs], {}
    for title in first[0].get("columns", {}):
        more[title] = mean_and_std([100 * row["columns"][title] for row in first])
    accuracy = [100 * row["accuracy"] for row in first]
    n = sum(row["n"] for row in first)
    interval = wilson(round(sum(row["accuracy"] * row["n"] for row in first)), n)
    for i, row in enumerate(runs[0][1:], 1):
        title = f"{row['data']}, %"
        if row["who"] != first[0]["who"]:
            title = f"{row['who']}, {title}"
        more[title] = mean_and_std([100 * rows[i]["accuracy"] for rows in runs])
    row = dict(
        method=method, thoughts=first[0].get("thoughts", "keep"), seeds=list(found),
        accuracy=accuracy, mean=np.mean(accuracy),
        std=np.std(accuracy, ddof=1) if len(accuracy) > 1 else 0.0, n=first[0]["n"],
        interval=[100 * bound for bound in interval], updates=updates,
        tokens=np.mean([r["tokens"] for r in first]),
        seconds_batch_1=mean_of(first, "seconds_batch_1", np.median),
        distance_item=mean_of(first, "distance_item"),
        distance_across=mean_of(first, "distance_across"), more=more)
    if row["thoughts"] != "keep":
        row |= dict(changed=[100 * r["changed"] for r in first], p=[r["p"] for r in first])
    if "pairs" in first[0]:
        row["pairs"] = [r["pairs"] for r in first]
    return row


def mean_of(rows, key, mean=np.mean):
    """The mean over the rows, or None where one of them has no such value."""
    values = [row.get(key) for row in rows]
    return None if None in values else float(mean(values))


def mean_and_std(values):
    """'97.2 ± 2.5', or '97.2' of a single one."""
    spread = f" ± {np.std(values, ddof=1):.1f}" if len(values) > 1 else ""
    return f"{np.mean(values):.1f}{spread}"


def read_tables(paths):
    """The rows of --beside's table.json files, each labelled with the script that wrote it."""
    rows = []
    for path in paths.split(",") if paths else ():
        try:
            with open(path) as f:
                table = json.load(f)
            for row in table["rows"]:
                label = f"{label_of(row)} ({table.get('script', path)})"
                rows.append(dict(method=label, accuracy=row.get("accuracy", [row["mean"]]),
                                 tokens=row["tokens"], seconds_batch_1=row["seconds_batch_1"],
                                 more=row.get("more", {}))
                            | {key: row[key] for key in OF_BATTERY if key in row})
            markdown(rows)                       # raises where a value is of another kind
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"--beside {path}: not a table.json of --table "
                            f"({runtime.first_line(error)}).") from None
    return rows


def label_of(row):
    """'coconut', or 'coconut, thoughts swap'."""
    thoughts = row.get("thoughts", "keep")
    return row["method"] if thoughts == "keep" else f"{row['method']}, thoughts {thoughts}"


def markdown(rows, floors=None):
    """Lines of Markdown: a line per row, then the floors {name: %}."""
    columns = {"method": label_of, "accuracy, %": lambda row: mean_and_std(row["accuracy"]),
               "tokens": lambda row: f"{row['tokens']:.1f}", "ms per question, batch 1": ms_cell}
    if any("p" in row for row in rows):
        columns |= {"changed, %": changed_cell, "p (largest)": largest_p_cell}
    if any(row.get("distance_across") is not None for row in rows):
        columns |= {"distance in item / across": both_distances_cell}
    extra = list(dict.fromkeys(column for row in rows for column in row["more"]))
    lines = ["| " + " | ".join([*columns, *extra]) + " |",
             "|---" * (len(columns) + len(extra)) + "|"]
    for row in rows:
        cells = [cell(row) for cell in columns.values()]
        lines.append("| " + " | ".join(cells + [row["more"].get(c, "") for c in extra]) + " |")
    empty = " |" * (len(columns) + len(extra) - 2)
    for name, value in (floors or {}).items():
        lines.append(f"| {name.removesuffix(', %')} | {value:.1f} |{empty}")
    return lines


def ms_cell(row):
    """Of the time of a question; reading other thoughts has none that says anything."""
    return "" if row["seconds_batch_1"] is None else f"{1000 * row['seconds_batch_1']:.1f}"


def changed_cell(row):
    """Answers that are not those with the model's own thoughts, in %."""
    return mean_and_std(row["changed"]) if "changed" in row else ""


def both_distances_cell(row):
    """Of what is fed back, see evaluation.distances; '- / 0.21' of a single thought."""
    cells = distance_cells(row)
    return "" if set(cells) == {"-"} else " / ".join(cells)


def largest_p_cell(row):
    """The largest p over the seeds: at the least, each of them says so much."""
    return p_cell(max(row["p"])) if "p" in row else ""


def validation(out, found):
    """Lines of Markdown: accuracy of validation in %, a mean over seeds, by update.
    found: what train_all returned."""
    lines = []
    for name, seeds in found.items():
        by_update = {}
        for seed in seeds:
            for event in read_events(os.path.join(out, f"{name}-{seed}")):
                if event["event"] == "valid":
                    by_update.setdefault(event["update"], []).append(100 * event["accuracy"])
        if not lines:
            cells = ["validation after updates", *(f"{update:,}" for update in by_update)]
            lines += ["", "| " + " | ".join(cells) + " |", "|---" * len(cells) + "|"]
        cells = [name, *(f"{np.mean(values):.1f}" for values in by_update.values())]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def print_sides(rows, flags):
    """The result of a run of teacher and student, or of a baseline: a line per test row, and by how
    much the student is shorter and faster than the teacher's words."""
    names = {"student": f"student, {flags.n_latent} thoughts", "teacher": "teacher, in words",
             "cot": "CoT", "no-cot": "no CoT"}
    print(f"\n{flags.method}, trained on {flags.data}, seed {flags.seed}")
    line = "{:<20} {:<13} {:>5} {:>8} {:>6} {:>9} {:>11} {:>11} {:>10} {:>6}".format
    print(line("", "test set", "n", "accuracy", "tokens", "rationale", "ms, batch 1",
               "ms, batched", "dist. item", "across"))
    for r in rows:
        print(line(names[r["who"]], r["data"], r["n"], f"{100 * r['accuracy']:.1f} %",
                   f"{r['tokens']:.1f}", f"{r['rationale']:.1f}",
                   f"{1000 * r['seconds_batch_1']:.1f}", f"{1000 * r['seconds']:.2f}",
                   *distance_cells(r)))
    print_pairs({f"{names[r['who']]}, {r['data']}": r for r in rows})
    print_cut(rows)
    if [r["who"] for r in rows[:2]] == ["student", "teacher"]:
        words, tokens, speed = (rows[1][key] / (rows[0][key] or math.nan)
                                for key in ("rationale", "tokens", "seconds_batch_1"))
        print(f"compression {words:.1f}x (rationale: words before the answer prompt, or <bot>, "
              f"thoughts, <eot>); tokens {tokens:.1f}x; speed-up at batch 1 {speed:.1f}x")


def write_table(script, flags, rows, updates, write_json, floors=None, curves=()):
    """Print the table, with the rows of --beside, and write it: table.md as printed, table.json
    the numbers. floors: {name: %}. curves: further lines. write_json: data_prep's."""
    seeds = ", ".join(map(str, rows[0]["seeds"]))
    lines = [f"{flags.data}, {rows[0]['n']:,} test questions, {updates:,} updates, seeds {seeds}",
             "", *markdown(rows + read_tables(flags.beside), floors), *curves]
    print("\n".join(lines))
    if runtime.RANK == 0:
        write_text(os.path.join(flags.out, "table.md"), "\n".join(lines) + "\n")
        write_json(os.path.join(flags.out, "table.json"),
                   dict(script=script, data=flags.data, settings=settings_of(flags, rows),
                        rows=rows, floors=floors or {}))


def settings_of(flags, rows):
    """The settings of the runs of a table, those that JSON has: figures are drawn over them. seeds:
    the list of them. The shape of --init X is that of its weights."""
    found = {name: value for name, value in vars(flags).items()
             if isinstance(value, (type(None), str, int, float, list))}
    if flags.init != "scratch":
        first = f"{flags.out}/{rows[0]['method']}-{rows[0]['seeds'][0]}/best.pt"
        config = weights.load_checkpoint(first)["config"]
        found |= {name: config[name] for name in settings.FROM_SCRATCH if name in config}
    return found | dict(seeds=rows[0]["seeds"])
