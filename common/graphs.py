"""Directed graphs, as ProsQA's questions describe them: neighbours, shortest paths, statistics.

Nodes are numbers, edges pairs (parent, child).
"""

import collections
import re
import statistics

from common.runtime import UserError

SENTENCE = r"(?:Every )?(\w+) is an? (\w+)\."     # a step of ProsQA: parent and child


def adjacency(edges, reverse=False):
    """{node: its children}, or with reverse its parents; nodes without any give []."""
    lists = collections.defaultdict(list)
    for a, b in edges:
        if reverse:
            a, b = b, a
        lists[a].append(b)
    return lists


def shortest_paths(children, start):
    """Breadth-first search. -> {node: distance}, {node: number of shortest paths}, over the nodes
    that can be reached from `start`."""
    distance, paths, queue = {start: 0}, {start: 1}, [start]
    for a in queue:
        for b in children[a]:
            if b not in distance:
                distance[b], paths[b] = distance[a] + 1, 0
                queue.append(b)
            if distance[b] == distance[a] + 1:
                paths[b] += paths[a]
    return distance, paths


def a_shortest_path(rng, edges, root, target):
    """The nodes of one of the shortest paths from root to target, each path equally likely."""
    parents = adjacency(edges, reverse=True)
    distance, paths = shortest_paths(adjacency(edges), root)
    path = [target]             # walked back, weighted by path counts: uniform over shortest paths
    while path[0] != root:
        above = [p for p in parents[path[0]] if distance.get(p) == distance[path[0]] - 1]
        path.insert(0, rng.choices(above, [paths[p] for p in above])[0])
    return path


def has_detour(edges, root, target):
    """Can one step off the shortest ways from root to target and still get there, by a longer
    one?"""
    children = adjacency(edges)
    left, _ = shortest_paths(adjacency(edges, reverse=True), target)    # steps to the target
    nodes = {root}
    for steps in range(left[root], 0, -1):
        below = set()
        for v in nodes:
            below.update(w for w in children[v] if w in left)
        if any(left[w] >= steps for w in below):
            return True
        nodes = {w for w in below if left[w] == steps - 1}
    return False


def wins(right, wrong):
    """100 where right > wrong, 0 where it is less, 50 for a tie."""
    if right == wrong:
        return 50
    return 100 * (right > wrong)


def graph_stats(items):
    """{row: mean over ProsQA items}. The last two are floors: what a guesser gets that only
    compares the two options by a surface property of the graph (a tie counts half).

    Raises UserError for a target that cannot be reached.
    """
    rows = collections.defaultdict(list)
    for item in items:
        edges, root = item["edges"], item["root"]
        target, wrong = item["target"], item["neg_target"]
        children, parents = adjacency(edges), adjacency(edges, reverse=True)
        distance, paths = shortest_paths(children, root)
        if target not in distance:
            raise UserError(f"the target of '...{item['question'][-40:]}' cannot be reached from "
                            "its root; correct or remove this item")
        ancestors = [len(shortest_paths(parents, v)[0]) for v in (target, wrong)]
        asked = re.search(r" a (\w+) or (\w+)\?$", item["question"])
        names = item["idx_to_symbol"]
        values = {
            "nodes": len(names),
            "edges": len(edges),
            "entity names": sum(s[:1].isupper() for s in names),
            "shortest path": distance[target],
            "shortest paths": paths[target],
            "children of the root": len(children[root]),
            "grandchildren": sum(d == 2 for d in distance.values()),
            "root is node 1, %": 100 * (root == 1),
            "right option first, %": 100 * bool(asked and asked[1] == names[target]),
            "with a detour, %": 100 * has_detour(edges, root, target),
            "floor: more ancestors, %": wins(*ancestors),
            "floor: fewer in-edges, %": wins(-len(parents[target]), -len(parents[wrong])),
        }
        for key, value in values.items():
            rows[key].append(value)
    return {key: statistics.fmean(values) for key, values in rows.items()}
