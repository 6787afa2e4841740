"""A sheet: a small table of numbers that is printed, and written as NAME.json, with a figure as
NAME.svg."""

import math
import os

from common.figure import line_plot
from common.files import write_jsons


def sheet(name, title, columns, rows, decimals=3, plot=None, claims=()):
    """A sheet, of plain values; a number that is not defined becomes None. plot: what line_plot
    takes after the path; claims: what the numbers say, (claim, numbers, verdict) each."""
    def plain(x):
        if isinstance(x, (str, int)):
            return x
        return None if math.isnan(x) else float(x)
    rows = [[plain(x) for x in row] for row in rows]
    return dict(name=name, title=title, columns=columns, rows=rows, decimals=decimals, plot=plot,
                claims=list(claims))


def show(shown, if_empty=""):
    """Print a sheet with aligned columns; if_empty: a line in place of rows that are missing."""
    def written(x):
        if x is None:
            return ""
        return f"{x:.{shown['decimals']}f}" if isinstance(x, float) else str(x)
    lines = [shown["columns"], *([written(x) for x in row] for row in shown["rows"])]
    widths = [max(map(len, column)) for column in zip(*lines)]
    print(f"\n{shown['title']}")
    for first, *others in lines:
        cells = [x.rjust(width) for x, width in zip(others, widths[1:])]
        print("  ".join([first.ljust(widths[0]), *cells]))
    if not shown["rows"]:
        print(if_empty)


def write(sheets, folder, **further):
    """Write each sheet as folder/NAME.json, with further values, and its figure as NAME.svg.
    Returns the names of the files."""
    contents, plots = {}, {}
    for one in sheets:
        contents[f"{one['name']}.json"] = {k: v for k, v in one.items() if k != "plot"} | further
        if one["plot"]:
            plots[f"{one['name']}.svg"] = one["plot"]
    write_jsons({os.path.join(folder, name): content for name, content in contents.items()})
    for name, plot in plots.items():
        line_plot(os.path.join(folder, name), *plot)
    return [*contents, *plots]
