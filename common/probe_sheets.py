"""Tables, figures and claims of probe_soft.py's probes, from the arrays that these found.

Nothing here knows of a model. A sheet is that of common/sheets.py; question (N,) says whose each of
N steps is.
"""

import math

import numpy as np

from common import claims
from common.sampling import mean_and_error
from common.sheets import sheet

DEEP = 6                                     # from so many layers on, layers are rows of a table
LEAD = (0.0, 0.5, 0.6, 0.7, 0.8, 1.01)       # bins of the first candidate's weight
MIXED, TOP = 0.6, 10                         # w of a soft token; a visible path is in the top 10
PARTS = (0, 10, 20, 30, 40, 50.01)           # bins of the second candidate's part, %


# ---------------------------------------------------------------- js


def js(found, by_step, least, lag):
    """found (N, 8): question, step, entropy, weight of the first candidate, JS of the next token to
    the first and to the second candidate, the largest JS of `lag` places to each. by_step: a row
    for each step; else all steps are uncertain, from `least` nats on."""
    unsure = found[found[:, 2] >= least]
    names = ["next, top-1", "next, top-2", "soon, top-1", "soon, top-2"]
    groups, columns = [("uncertain", unsure)], dict(zip(names, unsure.T[4:]))
    if by_step:
        steps = [(int(t), found[found[:, 1] == t]) for t in np.unique(found[:, 1])]
        groups = [*steps, ("all", found), *groups]
        late = {f"{name}, uncertain": columns[name] for name in names[2:]}
        columns = dict(zip(names, found.T[4:])) | late
    means = []
    for name, x in groups:
        numbers = [x[:, 2].mean(), *x[:, 4:].mean(0)] if len(x) else [math.nan] * 5
        means.append([name, len(x), *numbers])
    edges = np.linspace(0, math.log(2), 11)
    shares = {name: 100 * np.histogram(x, edges)[0] / max(1, len(x))
              for name, x in columns.items()}
    middles = (edges[1:] + edges[:-1]) / 2
    curves = {name: list(zip(middles, share)) for name, share in list(shares.items())[-4:]}
    return [
        sheet("js", "JS divergence in nats (at most ln 2 = 0.693): what follows the soft token, "
              "against what follows its top-1 or top-2 token alone;\n"
              f"soon: most of {lag} places; uncertain: from {least:g} nats",
              ["step", "n", "entropy", *names], means,
              claims=claims.of_js(unsure, LEAD[1], lag)),
        sheet("js-histogram", "the same as a histogram, % of the steps", ["JS from", *shares],
              [[f"{edge:.2f}", *row] for edge, *row in zip(edges, *shares.values())], 1,
              ("A soft token against its two likeliest parts", "JS divergence, nats", "steps, %",
               curves)),
        js_by_lead(unsure, names)]


def js_by_lead(unsure, names):
    """JS by the weight of the first candidate, with standard errors over questions."""
    lines, curves = [], {name: [] for name in names}
    labels = [f"< {edge:g}" for edge in LEAD[1:-1]] + ["to 1"]
    for at, (label, low, high) in enumerate(zip(labels, LEAD, LEAD[1:]), 1):
        x = unsure[(unsure[:, 3] >= low) & (unsure[:, 3] < high)]
        pairs = [claims.clustered(column, x[:, 0]) for column in x.T[4:]]
        lines.append([label, len(x), *(number for pair in pairs for number in pair)])
        for name, (mean, _) in zip(names, pairs):
            if len(x):
                curves[name].append((at, mean))
    columns = [column for name in names for column in (name, "±")]
    return sheet("js-lead", "JS at uncertain steps by the weight of the first candidate, and "
                 "standard errors, of questions", ["weight", "n", *columns], lines, plot=(
                     "JS by the weight of the first part", "weight of the first candidate",
                     "JS divergence, nats", curves, math.log(2), {}, labels))


# ---------------------------------------------------------------- lens


def lens(found, weights, question):
    """found (N, M, layers + 1, 4): at N forks, for M inputs of which the first candidate has
    weights (M,), after each layer: the first path's share of the probability of both, this
    probability, and how many tokens are likelier than each path."""
    n, M, depth, _ = found.shape
    layers = ["embedding", *(f"layer {i}" for i in range(1, depth))]
    share, both = found[..., 0], found[..., -1, 1]
    mean, curves = share.mean(0) if n else np.zeros((0, depth)), {}
    for weight, line in zip(weights, mean):
        if weight in (1, 0.7, 0.6, 0.5, 0.4, 0):
            curves[f"w = {weight:g}"] = list(enumerate(line))
    names, rows = [*layers, "probability of both"], []
    columns = ["w", *names]
    if n:
        rows = [[w, *line, last] for w, line, last in zip(weights, mean, both.mean(0))]
    if depth > DEEP and n:                       # layers are rows, so that the table is not wide
        columns = ["", *(f"w = {w:g}" for w in weights)]
        rows = [[name, *(row[i] for row in rows)] for i, name in enumerate(names, 1)]
    title = (f"logit lens at {n} forks: the first path's share in each layer, the input being w of "
             "the first candidate and 1 - w of the second")
    of_mix = found[:, list(weights).index(MIXED)]                              # (N, layers+1, 4)
    seen = of_mix[..., 2:] < TOP                                               # (N, layers+1, 2)
    shown = dict(both=seen.all(-1), first=seen[..., 0] & ~seen[..., 1],
                 second=seen[..., 1] & ~seen[..., 0])
    visible = [[layer, *(100 * x[:, i].mean() for x in shown.values())]
               for i, layer in enumerate(layers) if n]
    paths = {name: list(enumerate(100 * x.mean(0))) for name, x in shown.items() if n}
    return [
        sheet("lens", title, columns, rows, plot=(
            "Logit lens: the first path's share", "layer", "share of the two paths", curves, 1)),
        sheet("lens-visible", f"the same at w = {MIXED}: which paths are among the {TOP} likeliest "
              "tokens, % of the forks", ["layer", "both", "only the first", "only the second"],
              visible, 1, claims=claims.of_lens(shown["both"], of_mix[..., 0], question), plot=(
                  f"Which paths are visible, w = {MIXED}", "layer", "forks, %", paths, 100))]


# ---------------------------------------------------------------- the others


def rouge(found):
    """found: {mode: (questions, draws)}, ROUGE-L of each trace with the greedy one."""
    lines, curves, shares = [], {}, np.linspace(0, 100, 21)
    for mode, x in found.items():
        lines.append([mode, *mean_and_error(x.mean(1)), 100 * (x == 1).mean()])
        curves[mode] = list(zip(shares, np.percentile(x, shares)))
    return [sheet("rouge", "ROUGE-L of the thinking with greedy thinking, its standard error, and "
                  "how many are alike", ["mode", "ROUGE-L", "s. e.", "alike, %"], lines,
                  claims=claims.of_rouge(found), plot=(
                      "How much of the greedy thought is left", "percentile of thoughts",
                      "ROUGE-L", curves, 1))]


def randomness(found, question):
    """found: {name of noise: (randomness (N,), softness (N,))}, in order; a name is that of a mode,
    and perhaps of its setting."""
    lines, curves = [], {}
    for name, (random, soft) in found.items():
        lines.append([name, random.mean(), soft.mean()])
        curves.setdefault(name.split()[0], []).append((soft.mean(), random.mean()))
    title = f"randomness and softness, nats, at {len(question)} uncertain steps"
    return [sheet("randomness", title, ["noise", "randomness", "softness"], lines, plot=(
                      "Randomness against softness", "softness: entropy of a soft token, nats",
                      "randomness: JS of two draws, nats", curves),
                  claims=claims.of_randomness(found, question) if found else ())]


def branching(found, by_step):
    """found (N, 10): step, the second candidate's part of the two probabilities in %, what fork
    returned, question. by_step: a row for each step."""
    found = found[np.argsort(found[:, 0], kind="stable")]
    groups = [("all", found)] if len(found) else []
    if by_step:
        steps = [(int(t), found[found[:, 0] == t]) for t in np.unique(found[:, 0])]
        groups = [*steps, *groups]
    lines = [[name, len(x), x[:, 1].mean(), *(100 * x[:, 2:9].mean(0))] for name, x in groups]
    curves = dict.fromkeys(("soft takes the first's way", "soft takes the second's way"), ())
    for column, name in enumerate(curves, 7):
        bins = [found[(found[:, 1] >= low) & (found[:, 1] < high), column]
                for low, high in zip(PARTS, PARTS[1:])]
        curves[name] = [(low + 5, 100 * x.mean()) for low, x in zip(PARTS, bins) if len(x)]
    return [sheet("branching", "forks of greedy thoughts, %; the second's part is p2 / (p1 + p2)",
                  ["step", "n", "second's part", "rest differs", "answer differs", "right: first",
                   "right: second", "right: soft", "soft takes first", "soft takes second"],
                  lines, 1, claims=claims.of_branching(*found.T[7:]) if len(found) else (), plot=(
                      "Whose way does a soft token go?", "the second candidate's part, %",
                      "forks, %", curves, 100))]
