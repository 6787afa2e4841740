"""Pairs of questions: one of a test set, and the same with a single edge or number rewritten, so
that its right answer is another.

    Fae is a wumpus. Every wumpus is a dumpus. Every dumpus is a lempus. Every hilpus is a rorpus.
    Fae is a wumpus. Every wumpus is a hilpus. Every dumpus is a lempus. Every hilpus is a rorpus.
    .. Is Fae a lempus or rorpus?

All words but one are the same. A model that answers by the look of a question gives both of a pair
the same answer, and at most one of them is right. Read on in this order: edge_moves,
with_moved_edge, prosqa_mini_flips; then the same for numbers.
"""

import random
import re

from common.graphs import a_shortest_path, adjacency, shortest_paths
from common.puzzles import CHAINS_SIZES, MINI_SIZES, chains, operation, prosqa_mini, say
from common.runtime import UserError


def in_pairs(items, rewrite, what):
    """[original, changed, original, changed, ..], of those items that can be changed. Both have the
    field "pair", the original's place in `items`, counted from 0.

    rewrite: (rng, item) -> the changed item, or None if there is none. what: an edge or a number,
    for messages. Raises UserError if no item can be changed.
    """
    rng, found = random.Random("0 flips"), []
    for i, item in enumerate(items):
        changed = rewrite(rng, item)
        if changed:
            found += [item | {"pair": i}, changed | {"pair": i}]
    n = f"{len(found) // 2:,} of {len(items):,} questions can be flipped by one {what}"
    if not found:
        raise UserError(f"{n}; take other questions")
    print(n)
    return found


# ---------------------------------------------------------------- ProsQA: one edge

def edge_moves(item, n_steps):
    """All ways to flip a ProsQA item by moving the end of one edge, from (a, b) to (a, c): then the
    root reaches neg_target, in n_steps = (least, most), and target no longer. -> [(index of the
    edge, c)]

    c is a concept, not an entity. No edge is there twice, there is no cycle, and every node is
    still in a sentence.
    """
    edges, names, root = [tuple(e) for e in item["edges"]], item["idx_to_symbol"], item["root"]
    least, most = n_steps
    nodes = {v for edge in edges for v in edge}
    concepts = [v for v in sorted(nodes) if not names[v][0].isupper()]
    found = []
    for i, (a, b) in enumerate(edges):
        others = edges[:i] + edges[i + 1:]
        if item["target"] in shortest_paths(adjacency(others), root)[0]:
            continue                    # not all ways to the target lead over this edge
        for c in concepts:
            if c == b or (a, c) in others:
                continue
            moved = others + [(a, c)]
            children = adjacency(moved)
            distance, _ = shortest_paths(children, root)
            flips = (least <= distance.get(item["neg_target"], -1) <= most
                     and item["target"] not in distance)
            cycle = a in shortest_paths(children, c)[0]
            if flips and not cycle and nodes == {v for edge in moved for v in edge}:
                found.append((i, c))
    return found


def with_moved_edge(rng, item, n_steps):
    """A ProsQA item flipped by one of its edge_moves, each equally likely, or None without any. In
    the question one sentence ends with another concept; steps and answer are made anew.

    Raises UserError for an item without a graph, or whose question does not tell an edge.
    """
    where = f"the question '...{item['question'][-40:]}'"
    if "edges" not in item:
        raise UserError(f"{where} comes without its graph; make the data with 'python data_prep.py "
                        "prosqa'")
    moves = edge_moves(item, n_steps)
    if not moves:
        return None
    i, c = rng.choice(moves)
    names, root = item["idx_to_symbol"], item["root"]
    target, neg_target = item["neg_target"], item["target"]
    edges = [list(e) for e in item["edges"]]
    a, b = edges[i]
    old = say(names[a], names[b])
    if item["question"].count(old) != 1:
        raise UserError(f"{where} does not have the sentence '{old}', an edge of its graph, once; "
                        "correct or remove this item")
    edges[i] = [a, c]
    path = a_shortest_path(rng, edges, root, target)
    return item | {"question": item["question"].replace(old, say(names[a], names[c])),
                   "answer": say(names[root], names[target]),
                   "steps": [say(names[v], names[w]) for v, w in zip(path, path[1:])],
                   "edges": edges, "target": target, "neg_target": neg_target}


def prosqa_mini_flips():
    """{"test": items}: the test questions of prosqa-mini and their flips, of 3 steps each.

    What the look of the graph still gives away, the floors of graphs.graph_stats in %:

                            originals   changed
        more ancestors           45.0      99.4
        fewer in-edges           46.4      53.4

    In the originals each option is below one of the two entities, and the two look alike. One edge
    cannot keep that: afterwards the right option is below both entities, the wrong one below none.
    A guesser that counts ancestors is right on nearly all changed questions, but on half of the
    originals: it gets both of a pair right in 44 %. So judge by both, not by the changed ones, nor
    by how often its prediction follows the change, which is nearly always. (Training does not show
    this cue: there, too, each option is below one entity.) All originals have a detour (see
    puzzles.prosqa_mini), of the changed ones 67 %.
    """
    items = prosqa_mini((0, 0, MINI_SIZES[2]))["test"]
    return {"test": in_pairs(items, lambda rng, item: with_moved_edge(rng, item, (3, 3)), "edge")}


def prosqa_flips(items):
    """{"test": items}: ProsQA's test questions `items` and their flips, of 3 to 6 steps each.

    Of the 500 official ones 308 can be flipped. The floors of graphs.graph_stats on these, in %:

                            originals   changed
        more ancestors           62.3      90.9
        fewer in-edges           71.8      24.8

    As in prosqa_mini_flips, the option that has become wrong is below no entity any more.
    """
    return {"test": in_pairs(items, lambda rng, item: with_moved_edge(rng, item, (3, 6)), "edge")}


# ---------------------------------------------------------------- chains: one number

def solve(first, *numbers):
    """A chain of operations: the counts, `first` included, and the steps."""
    counts, steps = [first], []
    for n in numbers:
        result, step = operation(counts[-1], n)
        counts.append(result)
        steps.append(step)
    return counts, steps


def with_another_number(rng, item, limit=20):
    """An item of chains (facts in order, no distractors) with one number rewritten so that the
    answer is another, or None if there is none: any of its numbers is as likely, then any value.
    Counts stay below `limit`, n below 2 * limit, as in puzzles.chain_item."""
    places = list(re.finditer(r"\d+", item["question"]))
    given = [int(place[0]) for place in places]
    found = []                          # for each number, what can take its place
    for i in range(len(given)):
        values = range(1, limit) if i == 0 else range(2 * limit)
        good = []
        for value in values:
            counts, steps = solve(*given[:i], value, *given[i + 1:])
            if max(counts) < limit and str(counts[-1]) != item["answer"]:
                good.append((places[i], value, steps, str(counts[-1])))
        if good:
            found.append(good)
    if not found:
        return None
    place, value, steps, answer = rng.choice(rng.choice(found))
    question = item["question"][:place.start()] + str(value) + item["question"][place.end():]
    return item | {"question": question, "steps": steps, "answer": answer}


def chains_flips():
    """{"test": items}: the test questions of chains and their flips. Every number in them has been
    read in training, and every value is one that the generator could have drawn."""
    items = chains((0, 0, CHAINS_SIZES[2]))["test"]
    return {"test": in_pairs(items, with_another_number, "number")}


EMBEDDED = {                        # data sets that data_prep.load makes by itself
    "chains-flips": chains_flips,
    "prosqa-mini-flips": prosqa_mini_flips,
}
