"""The search tree of a ProsQA question (Coconut, section 5): values of its nodes, paths in words.

The value of a node is the probability that its name comes next. These functions compute it, and say
what a list of values shows: the frontier, the heights, the best nodes, a drawing; and which of
OUTCOMES a text that should be a path is.
"""

import re

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from common import scoring
from common.comparison import percent, share
from common.graphs import SENTENCE, adjacency, shortest_paths

OUTCOMES = ("Correct Path", "Longer Path", "Hallucination", "Wrong Target", "Correct Label",
            "Incorrect Label")
PERCENTILES = (10, 25, 50, 75, 90)
SIDES = ("leads to target", "does not")


class Graph:
    """The graph of one ProsQA item. depth {node: distance from the root}; height {node: distance to
    the nearest leaf below it}; reaches: the nodes that lead to the target, itself included."""

    def __init__(self, item):
        self.names, self.root, self.target = item["idx_to_symbol"], item["root"], item["target"]
        self.number = {name: i for i, name in enumerate(self.names)}
        self.edges = {tuple(edge) for edge in item["edges"]}
        self.children = adjacency(item["edges"])
        self.depth, _ = shortest_paths(self.children, self.root)
        self.reaches, _ = shortest_paths(adjacency(item["edges"], reverse=True), self.target)
        below = {v: shortest_paths(self.children, v)[0] for v in range(len(self.names))}
        self.height = {}
        for v, found in below.items():           # a cycle may have no leaf below it
            leaves = [d for w, d in found.items() if not self.children[w]]
            self.height[v] = min(leaves, default=0)


def classify(text, graph, answer):
    """One of OUTCOMES for what a model wrote after its thoughts (section 5.1).

    Steps are the sentences before the answer marker. They make a path if each is an edge and starts
    where the one before ended, the first at the root or below it, where the thoughts may have led.
    It is longer if no shortest way from the root ends with it. Without sentences the label counts.
    """
    sentences = [line for line in text.split("###")[0].split("\n") if line.strip()]
    if not sentences:
        return "Correct Label" if scoring.is_correct(text, answer) else "Incorrect Label"
    path = []
    for sentence in sentences:
        found = re.fullmatch(SENTENCE, sentence.strip())
        edge = tuple(graph.number.get(name) for name in found.groups()) if found else None
        if edge not in graph.edges or edge[0] not in (path[-1:] or graph.depth):
            return "Hallucination"
        path += edge[1:] if path else edge
    if path[-1] != graph.target:
        return "Wrong Target"
    shortest = graph.depth[path[0]] + len(path) - 1 == graph.depth[graph.target]
    return "Correct Path" if shortest else "Longer Path"


# ---------------------------------------------------------------- values of nodes

def name_ids(tok, name):
    """The tokens of a node's name after "Every": with " is a" where the tokenizer joins that to the
    name."""
    short, long = (tok.encode(f"Every {name}{rest}") for rest in ("", " is a"))
    return (short if long[:len(short)] == short else long)[len(tok.encode("Every")):]


def name_probabilities(model, cache, h, names):
    """Probability of each name: the product of those of all its tokens. h (B, C): the state that
    predicts a name's first token, its context in `cache`, read once for all names; names: for each
    row a list of token-id lists. Returns a list of B lists."""
    N = max(map(len, names))
    padded = [row + [[0]] * (N - len(row)) for row in names]
    flat = [torch.tensor(name) for name in sum(padded, [])]
    ids = pad_sequence(flat, batch_first=True, padding_value=-1).to(h.device)       # (B N, L)
    ids, real = ids.clamp(min=0), ids >= 0
    logs = model.head(h).float().log_softmax(-1).gather(1, ids[:, 0].view(-1, N))   # (B, N)
    if ids.size(1) > 1:
        states = model(ids[:, :-1], cache=cache.repeat(N), keep=real[:, 1:])
        rest = model.head(states).float().log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]
        logs = logs + (rest * real[:, 1:]).sum(1).view(logs.shape)
    return [row[:len(own)] for row, own in zip(logs.exp().tolist(), names)]


def frontier_summary(graphs, values, depth):
    """How the values lie on the frontier, the nodes `depth` steps from the root: a dict of means
    over the n items that have one of at least two nodes, one of which leads to the target.

    size: nodes; mass: sum of their values; effective: exp of the entropy of their shares in it (1:
    one path); right: share of nodes that lead to the target; chance: the same if all were alike.
    """
    rows = []
    for graph, value in zip(graphs, values):
        nodes = [v for v, d in graph.depth.items() if d == depth]
        good = [v in graph.reaches for v in nodes]
        if len(nodes) < 2 or not any(good):
            continue
        p = np.array([value[v] for v in nodes])
        q = p / max(p.sum(), 1e-30)
        entropy = -(q * np.log(np.maximum(q, 1e-30))).sum()
        rows.append((len(nodes), p.sum(), np.exp(entropy), q[good].sum(), np.mean(good)))
    means = np.mean(rows, axis=0).tolist() if rows else [float("nan")] * 5
    return dict(n=len(rows), **dict(zip(("size", "mass", "effective", "right", "chance"), means)))


def height_summary(graphs, values, depth):
    """{height: {"leads to target": (mean value, nodes), "does not": ..}} of the frontier."""
    found = {}
    for graph, value in zip(graphs, values):
        for v in (v for v, d in graph.depth.items() if d == depth):
            sides = found.setdefault(graph.height[v], {side: [] for side in SIDES})
            sides[SIDES[0] if v in graph.reaches else SIDES[1]].append(value[v])
    return {height: {side: (float(np.mean(x)) if x else None, len(x)) for side, x in sides.items()}
            for height, sides in sorted(found.items())}


def cumulated(values):
    """{n: PERCENTILES over the items of the summed value of the best n nodes}, n = 1, 2, 3."""
    best = [np.cumsum(sorted(value, reverse=True)) for value in values]
    return {n: np.percentile([b[min(n, len(b)) - 1] for b in best], PERCENTILES).tolist()
            for n in (1, 2, 3)}


def tree_lines(graph, value, width=20):
    """The nodes below the root, each once, as a tree with their values as bars."""
    lines, seen = [graph.names[graph.root]], {graph.root}

    def below(node, indent):
        fresh = [v for v in graph.children[node]
                 if graph.depth[v] == graph.depth[node] + 1 and v not in seen]
        seen.update(fresh)
        for v in fresh:
            last, goal = v == fresh[-1], ""
            if v in graph.reaches:
                goal = " = target" if v == graph.target else " leads to target"
            label = f"{indent}{'└' if last else '├'}─ {graph.names[v]}"
            bar = "█" * round(width * value[v])
            lines.append(f"{label:24} {value[v]:6.3f} {bar:{width}}{goal}".rstrip())
            below(v, indent + ("   " if last else "│  "))
    below(graph.root, "")
    return lines


# ---------------------------------------------------------------- tables

def report(rows, n):
    """Print the tables over n items. rows: for each number k of thoughts, 0 first, a dict of k,
    outcomes {name: share of the items} and, but for the first, what frontier_summary,
    height_summary and cumulated return: frontier, height, cumulated."""
    print(f"\n{n} test items. The frontier after k thoughts (k / c steps): nodes so "
          "many steps from the root, where they are two or more")
    line = "{:>3} {:>6} {:>8} {:>10} {:>11} {:>16} {:>8}".format
    print(line("k", "items", "nodes", "mass, %", "effective", "to the target, %", "chance"))
    for row in rows[1:]:
        f = row["frontier"]
        print(line(row["k"], f["n"], f"{f['size']:.2f}", percent(f["mass"]),
                   f"{f['effective']:.2f}", percent(f["right"]), percent(f["chance"])))
    print("\nmean value of frontier nodes by height (steps to the nearest leaf), in %, with their "
          "number")
    for row in rows[1:]:
        cells = []
        for height, sides in row["height"].items():
            means = [f"{side} {percent(mean)} ({n})" for side, (mean, n) in sides.items() if n]
            cells.append(f"height {height}: " + ", ".join(means))
        print(f"  k = {row['k']}   " + "   ".join(cells))
    print("\ncumulative value of the best nodes, in %, at percentiles "
          f"{', '.join(map(str, PERCENTILES))} of the items")
    for row in rows[1:]:
        cells = [f"top {n}: {' '.join(f'{100 * v:.0f}' for v in curve)}"
                 for n, curve in row["cumulated"].items()]
        print(f"  k = {row['k']}   " + "   ".join(cells))
    print("\nin words after k thoughts, % of the items")
    line = ("{:>3}" + " {:>15}" * len(OUTCOMES)).format
    print(line("k", *OUTCOMES))
    for row in rows:
        print(line(row["k"], *(percent(row["outcomes"][name]) for name in OUTCOMES)))


def measures_of(rows, n):
    """The measures of report's rows, of n items: {name: comparison.share, or a text}."""
    measures = {}
    for row in rows[1:]:
        f, k = row["frontier"], f"k = {row['k']}"
        measures[f"{k}, frontier: mass"] = share(f["mass"], f["n"], True)
        measures[f"{k}, frontier: effective nodes"] = f"{f['effective']:.2f} of {f['size']:.2f}"
        measures[f"{k}, frontier: to the target"] = share(f["right"], f["n"], True)
        measures[f"{k}, frontier: chance of that"] = percent(f["chance"])
        for height, sides in row["height"].items():
            means = [percent(sides[side][0]) for side in SIDES]
            measures[f"{k}, height {height}: leads to target / does not"] = " / ".join(means)
    for row in rows:
        for name, part in row["outcomes"].items():
            picture = name == "Correct Path" and row["k"] > 0
            measures[f"k = {row['k']}, in words: {name}"] = share(part, n, picture)
    return measures


def plots_of(rows):
    """What figure.line_plot takes, after a name: for each of report's rows but the first the
    cumulative value by percentile and the value by height."""
    plots = []
    for row in rows[1:]:
        k = row["k"]
        best = {f"top {n}": list(zip(PERCENTILES, v)) for n, v in row["cumulated"].items()}
        sides = {side: [(height, found[side][0]) for height, found in row["height"].items()
                        if found[side][1]]
                 for side in SIDES}
        plots += [(f"{k}-best", f"k = {k}", "percentile of questions", "cumulative value", best, 1),
                  (f"{k}-height", f"k = {k}", "steps to the nearest leaf", "value", sides, 1)]
    return plots
