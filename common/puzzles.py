"""Generated puzzles and word problems: ProsQA, ProntoQA, chains.

Each generator draws from a random.Random that it is given: the same state gives the same item.
`generate` makes whole splits of a data set from items. All items are {"question", "steps",
"answer"}; those of ProsQA also carry their graph (idx_to_symbol, edges, root, target, neg_target).
"""

import bisect
import itertools
import math
import random
import re

from tqdm import tqdm

from common.graphs import a_shortest_path, adjacency, has_detour
from common.runtime import UserError

SPLITS = ("train", "valid", "test")
PROSQA_SIZES = (17886, 300, 500)    # of train, valid and test: Coconut, table 2
PRONTOQA_SIZES = (9000, 200, 800)
MINI_SIZES = (40000, 300, 500)
CHAINS_SIZES = (50000, 500, 1000)


def generate(draw, sizes, seed, train=None):
    """{split: items} of the splits whose size is not 0, no question twice.

    draw(rng) gives a list of items, train(rng) those of the training split (default: draw). Each
    split has its own random stream, so another size of train leaves valid and test as they are.
    Raises UserError if there are not as many distinct questions.
    """
    splits, seen = {}, set()
    asked_for = [(split, size) for split, size in zip(SPLITS, sizes) if size]
    for split, size in reversed(asked_for):
        of_split = train if train and split == "train" else draw
        rng, items, wasted = random.Random(f"{seed} {split}"), [], 0
        with tqdm(total=size, desc=split, disable=None, leave=False) as bar:
            while len(items) < size:
                for item in of_split(rng):
                    if item["question"] in seen:
                        wasted += 1
                        continue
                    seen.add(item["question"])
                    items.append(item)
                    bar.update()
                if wasted > 100 * size:
                    raise UserError(f"only {len(seen):,} distinct questions found; ask for fewer "
                                    "with --sizes")
        splits[split] = items[:size]
    return {split: splits[split] for split in SPLITS if split in splits}


# ---------------------------------------------------------------- ProsQA: Coconut, Algorithm 1

ENTITIES = """Alex Bob Carol Davis Eva Fae Gabriel Jack Max Oliver Polly Rex Sally Sam Stella Tom
    Wren""".split()
CONCEPTS = """bompus boompus brimpus chorpus dumpus felpus fompus gerpus gorpus grimpus gwompus
    hilpus impus jelpus jompus kerpus lempus lorpus numpus quimpus rempus rompus rorpus scrompus
    shumpus sterpus storpus terpus timpus tumpus vumpus worpus wumpus yerpus yimpus yumpus zhorpus
    zumpus""".split()


def poisson(rng, mean):
    """Knuth's method: how many uniform factors keep the product above exp(-mean)."""
    k, random, floor = 0, rng.random, math.exp(-mean)
    product = random()
    while product > floor:
        k += 1
        product *= random()
    return k


def prosqa_graph(rng, n_draws):
    """Grow a directed acyclic graph from the roots 0 and 1 (Algorithm 1).

    A node's label is the set of roots above it as bits: 1 = only root 0, 2 = only root 1, 3 = both,
    0 = neither. -> labels [n_draws], edges [(parent, child)]; some nodes may have no edge.
    """
    labels, groups, edges, depth = [1, 2], [[], [0], [1], []], [], [0, 0]
    for idx in range(2, n_draws):
        n_in, r = poisson(rng, 1.5), rng.random()
        if r <= 0.34:
            candidates = groups[1].copy()
        elif r <= 0.80:
            candidates = groups[2].copy()
        else:
            candidates = list(range(idx))
        label, depths = 0, []
        for _ in range(min(n_in, len(candidates))):
            # deep nodes are preferred: long chains
            reach = list(itertools.accumulate([1.5 * depth[c] + 1 for c in candidates]))
            i = bisect.bisect(reach, rng.random() * reach[-1], 0, len(reach) - 1)
            parent = candidates.pop(i)
            label |= labels[parent]
            depths.append(depth[parent])
            edges.append((parent, idx))
        labels.append(label)
        groups[label].append(idx)
        depth.append(1 + min(depths, default=-1))
    return labels, edges


def prosqa_puzzle(rng, n_draws=28, names=(len(ENTITIES), len(CONCEPTS)), min_steps=3, max_steps=6,
                  alike=False):
    """A graph and a question about it. -> edges, root, target, neg_target.

    The paper leaves some of this open; we fitted it to the 800 official valid and test items:
    - number of nodes: 28 draws, and a node left without any edge disappears (mean 22.8, sd 2.0);
    - group thresholds: the paper prints r <= .35 and r <= .70, with groups[0] among the candidates,
      which gives 2.8 parentless nodes beyond the roots; the files have 0.56, and root 1 is asked in
      64 %. r <= .34, r <= .80 and no groups[0] gives both;
    - depth_to_root is the shortest distance to a node without parents;
    - the target is the deepest leaf that has only one of the roots above it (random among equals);
      its root is the one asked. neg_target is any leaf with only the other root above it;
    - 3 to 6 steps: no official item has fewer or more, so other graphs are drawn again.
    names: how many entities and concepts can be named. alike: neg_target is as deep below its root
    as target is below its own, so that the two look alike and no shortcut tells them apart.
    """
    while True:
        labels, edges = prosqa_graph(rng, n_draws)
        inner, concepts = {a for a, b in edges}, {b for a, b in edges}
        leaves = [[], []]               # below each root
        for v, label in enumerate(labels):
            if 0 < label < 3 and v not in inner:
                leaves[label - 1].append(v)
        told = {0, 1} | inner | concepts         # a node without edges has no sentence
        if not all(leaves) or len(told - concepts) > names[0] or len(concepts) > names[1]:
            continue
        distance = [{0: 0}, {1: 0}]
        for a, b in edges:              # shortest_paths, faster: edges into a node come before
            for found in distance:      # those out of it
                if a in found:
                    found[b] = min(found.get(b, n_draws), found[a] + 1)
        deepest = [max(distance[root][v] for v in leaves[root]) for root in (0, 1)]
        n_steps = max(deepest)
        if min_steps <= n_steps <= max_steps and (not alike or min(deepest) == n_steps):
            break
    targets = []
    for r in (0, 1):
        targets += [(r, v) for v in leaves[r] if distance[r][v] == n_steps]
    root, target = rng.choice(targets)
    other = 1 - root
    wrong = [v for v in leaves[other] if not alike or distance[other][v] == n_steps]
    neg_target = rng.choice(wrong)
    new = {old: i for i, old in enumerate(sorted(told))}
    return [(new[a], new[b]) for a, b in edges], root, new[target], new[neg_target]


def prosqa_item(rng, puzzle=None, entities=ENTITIES, concepts=CONCEPTS):
    """One ProsQA item in the authors' surface form. The steps are one of the shortest paths, each
    equally likely."""
    edges, root, target, neg_target = puzzle or prosqa_puzzle(rng)
    path, parents = a_shortest_path(rng, edges, root, target), adjacency(edges, reverse=True)
    entity = iter(rng.sample(entities, len(entities)))
    concept = iter(rng.sample(concepts, len(concepts)))
    n = 1 + max(map(max, edges))
    name = [next(concept if v in parents else entity) for v in range(n)]
    facts = [say(name[a], name[b]) for a, b in edges]
    rng.shuffle(facts)
    first, second = rng.sample([target, neg_target], 2)
    return {"question": " ".join(facts) + f" Is {name[root]} a {name[first]} or {name[second]}?",
            "answer": say(name[root], name[target]),
            "steps": [say(name[a], name[b]) for a, b in zip(path, path[1:])],
            "idx_to_symbol": name, "edges": [list(e) for e in edges],
            "root": root, "target": target, "neg_target": neg_target}


def say(a, b):
    """The sentence of an edge between two names: "Every wumpus is a dumpus.", "Fae is a wumpus."
    Entities have a capital, concepts have none."""
    every = "" if a[0].isupper() else "Every "
    return f"{every}{a} is a {b}."


def prosqa_mini(sizes=MINI_SIZES, seed=0):
    """{split: items}: Algorithm 1 small enough for tiny models: about 11 nodes, exactly 3 steps,
    few names, both options alike.

    Such graphs are rare among those drawn, so in train each is told eight times, with other names
    and in another order. Every question of valid and test has a detour (a third of train do), where
    a model that walks on from fact to fact, without looking ahead, loses its way; so has the wrong
    option from its own root, and each graph is asked about both, so that a detour tells nothing.
    """
    def draw(rng):
        return prosqa_puzzle(rng, 12, (4, 12), 3, 3, alike=True)

    def tell(rng, puzzle):
        return prosqa_item(rng, puzzle, ENTITIES[:4], CONCEPTS[:12])

    def train(rng):
        puzzle = draw(rng)
        return [tell(rng, puzzle) for _ in range(8)]

    def evaluate(rng):
        while True:
            edges, root, target, other = draw(rng)
            if has_detour(edges, root, target) and has_detour(edges, 1 - root, other):
                return [tell(rng, (edges, root, target, other)),
                        tell(rng, (edges, 1 - root, other, target))]

    return generate(evaluate, sizes, seed, train)


# ---------------------------------------------------------------- ProntoQA: arXiv 2210.01240

PROPERTIES = [family.split() for family in (
    "red blue green brown", "large small", "wooden metallic liquid", "opaque transparent",
    "happy shy nervous calm", "bright dull", "sweet sour bitter spicy", "hot cold mild",
    "kind mean angry", "loud muffled", "slow fast", "rainy sunny windy", "old new", "round flat",
    "rich poor", "wet dry")]


def prontoqa_item(rng, n_hops=5, sentences_per_step=1):
    """A true/false question on a made-up ontology, in the style of asaparov/prontoqa.

    "Every wumpus is a dumpus. Lempuses are not shy. .. Fae is a wumpus. True or false: Fae is shy."
    A chain of concepts leads from the entity in n_hops steps to the property that is asked for.
    Along it every concept has a second parent, which leads nowhere; all have properties of their
    own; and a concept that does not apply to the entity has the opposite of the property asked for.
    The sentences come in random order. steps: premise, rule, conclusion, rule, .. one sentence
    each, 2 * n_hops + 1 in all (the Coconut authors make six steps of them, two sentences each:
    sentences_per_step=2). Raises UserError for more hops than there are names.
    """
    if 2 * (n_hops + 3) > len(CONCEPTS):
        raise UserError(f"--n-hops {n_hops} needs more than the {len(CONCEPTS)} concept names "
                        f"there are; at most {len(CONCEPTS) // 2 - 3}")
    below, above = rng.randrange(2), rng.randrange(3)    # concepts before and after those used
    names = iter(rng.sample(CONCEPTS, len(CONCEPTS)))
    chain = [next(names) for _ in range(below + n_hops + above)]
    families = iter(rng.sample(PROPERTIES, len(PROPERTIES)))
    entity, start, last = rng.choice(ENTITIES), chain[below], chain[below + n_hops - 1]

    def rule(concept, what, kind):               # three ways to say it, as in the original
        article = ""
        if kind:
            article = "an " if what[0] in "aeiou" else "a "
        if rng.random() < 0.5:
            return f"{rng.choice(('Every', 'Each'))} {concept} is {article}{what}."
        return f"{concept.capitalize()}es are {what}{'es' if kind else ''}."

    def said(concept, what, positive=True):
        return rule(concept, what if positive else "not " + what, False)

    def property_of(concept):                    # one fact, or none when the families are used up
        family = next(families, None)
        if family is None:
            return []
        return [said(concept, rng.choice(family), rng.random() < 2 / 3)]

    def is_a(concept):
        return f"{entity} is a{'n' if concept[0] in 'aeiou' else ''} {concept}."

    rules, facts = {}, []                        # rules: those that the proof needs, by concept
    positive, asked = rng.random() < 2 / 3, rng.choice(next(families))
    for i, concept in enumerate(chain):
        if i + 1 < len(chain):
            rules[concept] = rule(concept, chain[i + 1], True)
            parent = next(names)
            facts += [rules[concept], rule(concept, parent, True)]
            facts += property_of(parent)
        if concept != last:
            facts += property_of(concept)
    rules[last] = said(last, asked, positive)
    facts += [rules[last], said(next(names), asked, not positive)]
    rng.shuffle(facts)

    proof = [is_a(start)]
    for i, concept in enumerate(chain[below:below + n_hops], below):
        final = f"{entity} is {'' if positive else 'not '}{asked}."
        proof += [rules[concept], final if concept == last else is_a(chain[i + 1])]
    answer = rng.random() < 0.5
    query = f"{entity} is {'' if positive == answer else 'not '}{asked}."
    return {"question": " ".join(facts) + f" {is_a(start)} True or false: {query}",
            "answer": str(answer), "steps": in_steps(proof, sentences_per_step)}


def in_steps(sentences, n):
    """Sentences joined into steps of n, the last perhaps shorter."""
    return [" ".join(sentences[i:i + n]) for i in range(0, len(sentences), n)]


# ---------------------------------------------------------------- chains: the embedded default

PEOPLE = "Ann Ben Cal Dan Eve Fay Gus Hal Ian Joy Kim Leo Max Ned Oli Pam Ray Sue Tom Zoe".split()
THINGS = "apples books cards coins eggs pens shells stamps".split()


def chain_item(rng, n_steps=3, limit=20, shuffled=False, distractors=0):
    """A word problem of n_steps operations in a row, each on the result of the one before.

    "Ned has 8 pens. Ben has what separates twice Ned from 9. Ian has what separates twice Ben from
    30. .. How many pens does Ray have?", steps like <<2*8-9=7>>, <<30-2*7=16>>. Each operation is
    v -> |2v - n|: doubling and folding, so that three of them in a row are no simple function of
    the question's numbers. With "more" and "fewer" instead, the answer would be one signed sum,
    which a model can learn to give at once, without any steps.
    All counts stay below `limit`, n below 2 * limit. distractors: facts about further people that
    no other fact needs, anywhere after the first fact. shuffled: facts in any order.
    Raises UserError for more people than there are names.
    """
    if n_steps + distractors >= len(PEOPLE):
        raise UserError(f"--n-steps {n_steps} and --distractors {distractors} need more than the "
                        f"{len(PEOPLE)} names there are; lower one of them")
    people, thing = rng.sample(PEOPLE, n_steps + 1 + distractors), rng.choice(THINGS)
    counts = [rng.randrange(1, limit)]
    facts, steps = [f"{people[0]} has {counts[0]} {thing}."], []
    for i in range(1, len(people)):
        before = i - 1 if i <= n_steps else rng.randrange(n_steps)
        v = counts[before]
        n = rng.choice([n for n in range(2 * limit) if abs(2 * v - n) < limit])
        result, step = operation(v, n)
        counts.append(result)
        fact = f"{people[i]} has what separates twice {people[before]} from {n}."
        if i <= n_steps:
            facts.append(fact)
            steps.append(step)
        else:
            facts.insert(rng.randrange(1, len(facts) + 1), fact)
    if shuffled:
        rng.shuffle(facts)
    return {"question": " ".join(facts) + f" How many {thing} does {people[n_steps]} have?",
            "steps": steps, "answer": str(counts[n_steps])}


def operation(v, n):
    """|2v - n|, and the step that says so: (8, 9) -> 7, "<<2*8-9=7>>"."""
    result = abs(2 * v - n)
    difference = f"2*{v}-{n}" if 2 * v >= n else f"{n}-2*{v}"
    return result, f"<<{difference}={result}>>"


def chains(sizes=CHAINS_SIZES, seed=0, **shape):
    """{split: items}. shape: what chain_item takes."""
    return generate(lambda rng: [chain_item(rng, **shape)], sizes, seed)


def chains_mixed(sizes=CHAINS_SIZES, seed=0, n_steps=3):
    """{split: items}: valid and test of chains; train has chains of 1 to n_steps operations, the
    longest four times as often as each of the others (1 : 1 : 4).

    From three only, a model that must find out by itself what to think of (CODI) may learn nothing:
    the first result is of no use to it before it can use two. Coconut, too, then leaves its first
    thought empty more often. With many of two, a model that has learned those well is slow to go on
    to three. The papers' own data is mixed too.
    """
    def train(rng):
        n, = rng.choices(range(1, n_steps + 1), (n_steps - 1) * [1] + [4])
        return [chain_item(rng, n_steps=n)]
    return generate(lambda rng: [chain_item(rng, n_steps=n_steps)], sizes, seed, train)


def chains_longer():
    """{"test": items}: one operation more than in the default chains."""
    return generate(lambda rng: [chain_item(rng, n_steps=4)], (0, 0, CHAINS_SIZES[2]), 0)


def chains_larger():
    """{"test": items}: in each, some count goes beyond those of the default chains, where they stay
    below 20, up to 39. Only the counts are new: every number has been read in training, where n
    goes up to 39 too. (Other numbers would be unknown words to a compact tokenizer.)"""
    def draw(rng):
        item = chain_item(rng, limit=40)
        given = [int(n) for n in re.findall(r"\d+", item["question"])]    # first count, then each n
        results = [int(n) for n in re.findall(r"=(\d+)", "".join(item["steps"]))]
        if max(given[:1] + results) >= 20 and max(given) < 40:
            return [item]
        return []
    return generate(draw, (0, 0, CHAINS_SIZES[2]), 0)


EMBEDDED = {                        # data sets that data_prep.load makes by itself
    "chains": chains,
    "chains-mixed": chains_mixed,
    "chains-longer": chains_longer,
    "chains-larger": chains_larger,
    "prosqa-mini": prosqa_mini,
}
