"""A model next to its controls: results of steps among decoded tokens, intervals, a joint table.

That results of steps can be read in a model's thoughts says something about thinking only if they
cannot be read as well in the states of a model that has no thoughts. In arXiv 2606.12689 (GPT-2,
GSM8k) the share of results that the head finds in them is 62.1 % for <pause> tokens, more than for
Coconut (45.4), CODI (41.5) and plain CoT (28.2).

A measure is a dict of `share`, or a text that is only shown; a column is (label, does the model
think, {name: measure}).
"""

import math
import os
import re

from common import sheets
from common.graphs import SENTENCE
from common.runtime import UserError
from common.scoring import wilson


# ---------------------------------------------------------------- results of steps


def result_of(step):
    """What a step writes after its last '=': <<2*8-9=7>> -> '7'; None if there is nothing."""
    found = re.search(r"=\s*([^=<>]*?)\s*(?:>>|$)", step.strip())
    return found[1] if found and found[1] else None


def bare(piece):
    """A token's text without blanks around it, and without the " is a" that compact-is-a joins to
    a name."""
    return re.sub(r"\s+is an?$", "", piece.strip())


def results_of(item, tok):
    """For each step of an item what a token must be to be its result, or None if it has none.

    With a graph (ProsQA) that is the name that the step reaches, "Every cat is a dog." -> 'dog', or
    the first token of it; otherwise what result_of finds, which must be one token."""
    if "edges" not in item:
        return [result_of(step) for step in item["steps"]]
    found = [re.fullmatch(SENTENCE, step.strip()) for step in item["steps"]]
    return [first_token(step[2], tok) if step else None for step in found]


def first_token(name, tok):
    """The bare text of the first token of a name that is more than blanks."""
    pieces = [bare(tok.decode([t])) for t in tok.encode(f" {name}")]
    return next(filter(None, pieces))


def hits(results, chosen, decoded):
    """Which results are among the tokens? {kind: a bool for each result of the chosen items}.

    results: what results_of gives for each item; chosen: numbers of items; decoded: for each item a
    list of sets, the five most probable tokens of each state (bare text). Kinds: all_steps: among
    the tokens of some state; intermediate: without the last step, whose result is the answer;
    swapped: with the states of the next chosen item, what chance gives."""
    found = {"all_steps": [], "intermediate": [], "swapped": []}
    for i, other in zip(chosen, chosen[1:] + chosen[:1]):
        for j, result in enumerate(results[i]):
            if result is None:
                continue
            found["all_steps"].append(any(result in tokens for tokens in decoded[i]))
            found["swapped"].append(any(result in tokens for tokens in decoded[other]))
            if j + 1 < len(results[i]):
                found["intermediate"].append(found["all_steps"][-1])
    return found


def mean(values):
    """None if there are none."""
    return sum(values) / len(values) if values else None


def agreement(results, right, decoded):
    """Are the steps' results among the tokens (CODI, table 3)? {number of steps: the mean of each
    kind of `hits`, and n}, over the n items that were answered correctly (right: bools)."""
    rows = {}
    for m in sorted({len(steps) for steps in results}):
        chosen = [i for i, steps in enumerate(results) if len(steps) == m and right[i]]
        found = hits(results, chosen, decoded)
        if found["all_steps"]:
            rows[m] = dict(n=len(chosen), **{kind: mean(own) for kind, own in found.items()})
    return rows


def pooled(results, right, decoded):
    """The measures of `hits` over steps of all kinds of items, {name: share}; {} if no step has a
    result. Also of items that were not answered correctly, which a control may have many of."""
    some = [i for i, steps in enumerate(results) if any(steps)]
    correct = [i for i in some if right[i]]
    found, of_correct = hits(results, some, decoded), hits(results, correct, decoded)
    if not some:
        return {}
    name = "results of steps in the top 5"
    return {
        name: share(mean(found["all_steps"]), len(some), True),
        f"{name}, without the last": share(mean(found["intermediate"]), len(some), True),
        f"{name}, other item's states": share(mean(found["swapped"]), len(some)),
        f"{name}, items answered right": share(mean(of_correct["all_steps"]), len(correct), True)}


def explained(steps, said, right):
    """Does a decoder write the steps that thoughts stand for? steps, said: for each item what it
    should write, and what it wrote, of each of its thoughts; '' for a step that an item has not.
    right: bools. Returns for each thought a dict: n, how many items have that step, and means:
    exact (it is the same text), of_right, of_wrong (the same, of items answered right or wrong),
    swapped (the text is that of the next such item)."""
    rows = []
    for i in range(max(map(len, steps), default=0)):
        have = [j for j, own in enumerate(steps) if own[i:i + 1] not in ([], [""])]
        exact = {j: said[j][i] == steps[j][i] for j in have}
        swapped = [said[other][i] == steps[j][i] for j, other in zip(have, have[1:] + have[:1])]
        rows.append(dict(n=len(have), exact=mean(exact.values()), swapped=mean(swapped),
                         of_right=mean([exact[j] for j in have if right[j]]),
                         of_wrong=mean([exact[j] for j in have if not right[j]])))
    return rows


def print_explained(steps, said, right, data, shown=0):
    """Print a table of `explained`, and one item, `shown`. data: the name of the items. Returns
    measures of steps of all kinds, {name: share}."""
    print(f"\n{data}, item {shown + 1}: steps, and what the decoder writes from their thoughts")
    for i, step in enumerate(steps[shown]):
        print(f"{i + 1:>3}  {step or '(none)'}\n     {said[shown][i]}")
    print(f"\n{data}, {len(right)} items: steps that the decoder writes as the data has them, %")
    line = "{:>8} {:>7} {:>7} {:>22} {:>22} {:>29}".format
    print(line("step", "items", "all", "items answered right", "items answered wrong",
               "with another item's thoughts"))
    rows = explained(steps, said, right)
    for i, r in enumerate(rows, 1):
        print(line(i, r["n"], *(percent(r[k]) for k in ("exact", "of_right", "of_wrong",
                                                        "swapped"))))
    name, n = "steps that the decoder writes", sum(r["n"] for r in rows)
    found = {}
    for kind, label in (("exact", name), ("swapped", f"{name}, other item's thoughts")):
        total = sum(r["n"] * (r[kind] or 0) for r in rows)
        found[label] = share(total / n if n else None, len(right))
    return found


def print_agreement(table, right, word):
    """Print the table of `agreement`. word: what states are called."""
    print(f"\n{len(right)} test items, {percent(mean(right))} % answered correctly. Of those: "
          f"results of steps among the top 5 tokens of some {word}, in %")
    line = "{:>6} {:>7} {:>10} {:>19} {:>29}".format
    print(line("steps", "items", "all steps", "without the last", f"with another item's {word}s"))
    for m, r in table.items():
        print(line(m, r["n"], *(percent(r[k]) for k in ("all_steps", "intermediate", "swapped"))))
    if not table:
        print("(no such item has a step with a result: a number after '=', or a name of a graph)")


# ---------------------------------------------------------------- side by side


def check_comparable(subjects, items):
    """Raises UserError if Subjects were trained on other data than the first, or read the items in
    other tokens: then shares of tokens say nothing about models."""
    def tokens(x):
        texts = sum(([item["question"], *item["steps"]] for item in items), [])
        return [[x.s.tok.decode([t]) for t in x.s.tok.encode(text)] for text in texts]

    first, *others = subjects
    for x in others:
        data, of_first = (os.path.normpath(y.s.flags.data) for y in (x, first))
        if data != of_first:
            raise UserError(f"{x.path} was trained on {data}, {first.path} on {of_first}: give "
                            "models of the same data, or with --data what all are asked.")
        if tokens(x) != tokens(first):
            raise UserError(f"{x.path} has another tokenizer than {first.path}, so their tokens "
                            "cannot be compared; train both with the same --tokenizer.")


def share(mean, n, picture=False):
    """A measure: the mean over n items of something in 0..1, None or nan if there is none.
    picture: it is what people see thinking in. Wilson's interval is of a share; a mean of values in
    0..1 spreads less, so that it is rather too wide."""
    known = mean is not None and not math.isnan(mean)
    low, high = wilson(min(mean, 1) * n, n) if known else (0.0, 1.0)
    return dict(mean=mean if known else None, n=n, low=low, high=high, picture=picture)


def percent(value):
    return "-" if value is None else f"{100 * value:.1f}"


def cell(measure):
    """'97.4 (95.6 to 98.5)', or the text that a measure is."""
    if not isinstance(measure, dict):
        return measure
    if measure["mean"] is None:
        return "-"
    low, high = percent(measure["low"]), percent(measure["high"])
    return f"{percent(measure['mean'])} ({low} to {high})"


def side_by_side(columns):
    """Print a line for each measure with its cell in each column, and what follows from them. A
    measure that is 0 in all columns is left out."""
    def is_zero(measure):
        return isinstance(measure, dict) and measure["mean"] == 0

    names = list(dict.fromkeys(name for _, _, measures in columns for name in measures))
    rows = []
    for name in names:
        found = [measures.get(name, "") for _, _, measures in columns]
        if not all(map(is_zero, found)):
            rows.append([name, *map(cell, found)])
    title = "side by side: shares in %, with 95 % intervals (Wilson; an item counts once)"
    sheets.show(sheets.sheet("probe", title, ["", *(label for label, _, _ in columns)], rows))
    print("\n" + "\n".join(verdicts(columns, names)))


def verdicts(columns, names):
    """Sentences on where a control, a model that does not think, reaches what a model that thinks
    has: in which pictures the upper end of its interval is as high."""
    def shown(measures, name):
        own = measures.get(name)
        is_picture = isinstance(own, dict) and own["picture"] and own["mean"]
        return own if is_picture else None

    models = [column for column in columns if column[1]]
    controls = [column for column in columns if not column[1]]
    if not models or not controls:
        return ["(no verdict: that takes a model that thinks and a control that does not)"]
    lines = []
    for name in names:
        for label, _, measures in models:
            own, reached = shown(measures, name), []
            for control, _, found in controls:
                other = shown(found, name)
                if own and other and other["high"] >= own["mean"]:
                    reached.append(f"{control} up to {percent(other['high'])} %")
            if reached:
                lines.append(f"{name}: {label} has {percent(own['mean'])} %, "
                             f"{', '.join(reached)}: the control shows it too.")
    return lines or ["No control reaches what a model has."]
