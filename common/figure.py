"""Line plots as SVG files, without any package. Test accuracy by stage, from runs of coconut.py, or
by any setting, from the tables of --table (means over seeds, which are dots):

    python -m common.figure OUT.svg out/chains-mixed-coconut-0 out/chains-mixed-coconut-1
    python -m common.figure OUT.svg --by n_layer out/depth-2/table.json out/depth-4/table.json
"""

import argparse
import html
import json
import math
import os

from common import runtime
from common.files import write_text
from common.run import read_events

WIDTH, HEIGHT = 680, 340                         # pixels
LEFT, RIGHT, TOP, BOTTOM = 76, 420, 48, 284      # the area between the axes; right of it the legend
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#000000")   # Okabe and Ito 2008
MARKERS = ("M-4,-4h8v8h-8z", "M0,-5l5,9h-10z", "M0,-6l6,6l-6,6l-6,-6z", "M-6,-2h12v4h-12z")


def ticks(high, least):
    """At most seven round numbers from 0 to `high`, `least` or more apart."""
    rough = max(high / 6, least)
    power = 10 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power > 0.999 * rough)
    return [i * step for i in range(int(high / step + 1e-6) + 1)]


def line_plot(path, title, x_label, y_label, lines, top=None, dots={}, names=()):
    """Write a plot as an SVG file. lines: {label: [(x, y), ..]}. Both axes begin at 0; top: where
    the y axis ends, if not at the highest point. dots: the same as lines, small and not joined.
    names: what is written at x = 1, 2, .. in place of numbers."""
    xs, ys = zip(*sum(lines.values(), [(0, 0)]))
    widest, top = max(xs) or 1, top or max(ys) or 1

    def place(x, y):
        return LEFT + (RIGHT - LEFT) * x / widest, BOTTOM - (BOTTOM - TOP) * y / top

    def text(x, y, content, more=""):
        svg.append(f'<text x="{x:.1f}" y="{y:.1f}" {more}>{html.escape(content)}</text>')

    svg = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
           f'width="{WIDTH}" font-family="sans-serif" font-size="12" fill="#222">',
           f'<rect width="{WIDTH}" height="{HEIGHT}" rx="12" fill="#fff"/>']
    text(LEFT, 26, title, 'font-size="15" font-weight="bold"')
    text((LEFT + RIGHT) / 2, BOTTOM + 42, x_label, 'text-anchor="middle"')
    text(-(TOP + BOTTOM) / 2, 18, y_label, 'text-anchor="middle" transform="rotate(-90)"')
    for tick in ticks(top, 1e-9):
        y = place(0, tick)[1]
        svg.append(f'<path d="M{LEFT},{y:.1f}H{RIGHT}" stroke="#d8d8d8"/>')
        text(LEFT - 10, y + 4, f"{tick:g}", 'text-anchor="end"')
    least = 1 if all(float(x).is_integer() for x in xs) else 1e-9
    written = {tick: f"{tick:g}" for tick in ticks(widest, least)}
    for tick, name in (dict(enumerate(names, 1)) or written).items():
        text(place(tick, 0)[0], BOTTOM + 20, name, 'text-anchor="middle"')
    by_end = sorted(lines, key=lambda label: [-y for _, y in lines[label][-1:]])      # the legend's
    for i, (label, line) in enumerate(lines.items()):
        colour, mark = COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)]
        at, legend = [place(*point) for point in line], TOP + 4 + 20 * by_end.index(label)
        ends = " ".join(f"{x:.1f},{y:.1f}" for x, y in at)
        svg.append(f'<polyline points="{ends}" fill="none" stroke="{colour}" stroke-width="2"/>')
        for x, y in [*at, (RIGHT + 24, legend)]:
            svg.append(f'<path d="{mark}" fill="{colour}" transform="translate({x:.1f},{y:.1f})"/>')
        for x, y in (place(*point) for point in dots.get(label, ())):
            svg.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2" fill="{colour}" opacity="0.6"/>')
        text(RIGHT + 38, legend + 4, label[-33:])            # what there is room for
    write_text(path, "\n".join([*svg, "</svg>\n"]))


def stages(folder):
    """[(stage, test accuracy in %), ..] of a run. Raises UserError if its folder holds none."""
    events = read_events(folder)
    found = [(e["stage"], 100 * e["accuracy"]) for e in events if e["event"] == "stage"]
    if not found:
        raise runtime.UserError(f"{folder} has no metrics.jsonl with a finished stage; give the "
                                "folder of a run of coconut.py.")
    return found


def read_table(path, by):
    """(the setting `by`, {label: accuracies in %}) of a table.json; a label is a method, or
    METHOD:KIND for a row of the battery. Raises UserError if the file has no such setting."""
    try:
        with open(path) as f:
            table = json.load(f)
        settings, rows = table["settings"], {}
        for row in table["rows"]:
            label = ":".join(filter(None, [row["method"], row["thoughts"].replace("keep", "")]))
            rows[label] = [float(accuracy) for accuracy in row["accuracy"]]
        names = ", ".join(name for name, value in settings.items() if value is not None)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise runtime.UserError(f"{path}: not a table.json with its settings "
                                f"({runtime.first_line(error)}); give what this version's --table "
                                "wrote.") from None
    if settings.get(by) is None or isinstance(settings[by], list):
        raise runtime.UserError(f"{path}: --by {by} is no setting of it; choose among {names}.")
    return settings[by], rows


def by_setting(paths, by, wanted=None):
    """What line_plot draws of some table.json files: lines, dots and names of values that are no
    numbers. wanted: labels of rows; None: all but those of the battery."""
    found = {}                                           # {label: {value: accuracies}}
    for path in paths:
        value, rows = read_table(path, by)
        for label in wanted or [label for label in rows if ":" not in label]:
            if label not in rows:
                raise runtime.UserError(f"{path}: has no row {label!r}; choose --rows among "
                                        f"{', '.join(rows)}.")
            found.setdefault(label, {}).setdefault(value, []).extend(rows[label])
    values = list(dict.fromkeys(value for line in found.values() for value in line))
    names = []
    if not all(type(value) in (int, float) for value in values):
        names = [str(value) for value in values]
    lines, dots = {}, {}
    for label, line in found.items():
        at = {values.index(value) + 1 if names else value: y for value, y in line.items()}
        lines[label] = [(x, sum(y) / len(y)) for x, y in sorted(at.items())]
        dots[label] = [(x, accuracy) for x, y in sorted(at.items()) for accuracy in y]
    return lines, dots, names


def main(argv=None):
    p = argparse.ArgumentParser("python -m common.figure", description="Test accuracy by stage, or "
                                "with --by by a setting.")
    p.add_argument("out", metavar="OUT.svg", help="the picture, overwritten")
    p.add_argument("paths", metavar="PATH", nargs="+",
                   help="folder of a run of coconut.py; with --by a table.json")
    p.add_argument("--by", metavar="SETTING", help="n_layer, c, ..: as table.json names it")
    p.add_argument("--rows", help="--by: the rows, with commas, as coconut,coconut:swap,cot "
                                  "(default: all with their own thoughts)")
    p.add_argument("--label", help="--by: what to call the setting (default: its own name)")
    args = p.parse_args(argv)
    if (args.rows or args.label) and not args.by:
        flag = "--rows" if args.rows else "--label"
        p.error(f"{flag} is for tables: add --by SETTING, or leave it out")
    if args.by:
        by = args.by.replace("-", "_")
        wanted = args.rows.split(",") if args.rows else None
        lines, dots, names = by_setting(args.paths, by, wanted)
        label = args.label or by
        line_plot(args.out, f"Accuracy by {label}", label, "test accuracy, %", lines, 100, dots,
                  names)
    else:
        lines = {os.path.normpath(f).removeprefix("out/"): stages(f) for f in args.paths}
        line_plot(args.out, "Accuracy by stage", "stage", "test accuracy, %", lines, top=100)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    runtime.run_main(main)
