"""What continuous thoughts hold: a look inside trained models, and inside their controls.

    python probe.py out/chains-mixed-codi-0/best.pt
    python probe.py out/prosqa-mini-coconut-0/best.pt out/prosqa-mini-pause-as-thought-0/best.pt

Of all models (CODI: Shen et al. 2025, table 3 and figure 5):
  - each thought decoded through the head, and the tokens of the question that it looks at;
  - are the results of the steps among the five tokens that a thought is closest to?
Of those of simcot.py also what their decoder writes from the thoughts of each step.
Of those of coconut.py (Hao et al. 2024, section 5), if they were trained with --uniform-prob and
the data has graphs (ProsQA), also what they say after k thoughts, one of OUTCOMES, and
  - the search tree: the value of a node is the probability that its name comes after "Every"; does
    the model follow one path, or several?
  - the value of nodes by their height (steps to the nearest leaf), for nodes that lead to the
    target and nodes that do not: is the difference clear only near the leaves?

A picture that a model without thoughts shows too is worth nothing (arXiv 2606.12689), so several
checkpoints are shown next to each other, with a joint table and where a control reaches a model.
Thought i is the last state at the position before it: at <bot>, thought 1, .. thought k - 1. In
place of k thoughts are read, of a model trained with --method
    pause, pause-as-thought       the states at <bot>, <pause> 1, .. <pause> k - 1: exactly those
                                  that Coconut would feed back;
    cot                           the states at the first k tokens that it writes: the same
                                  positions, and its next words are all they are trained for;
    no-cot, icot, no-thought      the states at the last k tokens of the question, as only the
                                  answer follows.
"After k thoughts" is after k <pause> tokens; a model without these is asked right after the
question ("Every" follows it), so that nothing depends on k.
"""

import argparse
import contextlib
import os
from collections import Counter
from types import ModuleType
from typing import NamedTuple

import numpy as np
import torch

import coconut
import codi
import data_prep
import simcot
from common import comparison, evaluation, frontier, runtime, scoring, staged, weights
from common.comparison import share
from common.evaluation import limit
from common.experiment import Setup
from common.figure import line_plot
from common.frontier import (OUTCOMES, Graph, classify, cumulated, frontier_summary, height_summary,
                             name_ids, name_probabilities, tree_lines)
from common.runtime import UserError, count
from common.text import Example, Sequence, collate
from gpt2 import StaticCache
from llama import Llama, rotary

THINK = ("codi", "simcot", *coconut.FEEDS_BACK)
PAUSE = ("pause", "pause-as-thought")


# ---------------------------------------------------------------- what the model is asked

def after(s, example, k, words):
    """The Sequence of a question, k thoughts (or <pause> tokens, or nothing) and words (ids)."""
    method = dict(pause="pause-as-thought", simcot="coconut").get(s.flags.method, s.flags.method)
    return coconut.curriculum(Example(example.question, [], words), k, 1, k, method, s.tok)


def with_thoughts(s, examples, k, words, room):
    """Read question, k thoughts and words. s: experiment.Setup. Returns the cache with `room`
    columns left, the last state (B, C) and the thoughts (B, k, C)."""
    batch = collate([after(s, e, k, words) for e in examples], s.tok.eos, s.machine.device)
    n_columns = batch.prompt.size(1) + batch.latent.size(1) + batch.language.size(1) + room
    cache = StaticCache(s.model.config, len(examples), n_columns, s.machine.device, s.machine.dtype)
    x, keep, thoughts = coconut.think(s.model, cache, batch.prompt, batch.keep, batch.latent)
    return cache, coconut.read_on(s.model, cache, x, keep, batch.language)[:, -1], thoughts


def node_values(s, items, examples, k, batch_size=32):
    """The value of every node of every item after k thoughts: a list of lists (section 5.2)."""
    every, values = s.tok.encode("Every"), []
    for i in range(0, len(items), batch_size):
        chunk = slice(i, i + batch_size)
        names = [[name_ids(s.tok, name) for name in item["idx_to_symbol"]] for item in items[chunk]]
        room = max(map(len, sum(names, [])))
        cache, h, _ = with_thoughts(s, examples[chunk], k, every, room)
        values += name_probabilities(s.model, cache, h, names)
    return values


def spoken(s, examples, k, batch_size=128):
    """What the model writes after k thoughts: a list of texts."""
    texts = []
    for i in range(0, len(examples), batch_size):
        cache, h, _ = with_thoughts(s, examples[i:i + batch_size], k, [], limit(s))
        texts += map(s.tok.decode, s.model.decode(cache, h, limit(s), s.tok.eos))
    return texts


def decoded_thoughts(s, thoughts):
    """For each of thoughts (k, C), as they are before any projection: norm, entropy in nats of its
    distribution through the head, the five most probable tokens."""
    rows = []
    for thought in thoughts.float():
        p = s.model.head(thought).softmax(-1)
        likely = zip(*(x.tolist() for x in p.topk(5)))       # probabilities, tokens
        rows.append(dict(norm=thought.norm().item(), entropy=torch.special.entr(p).sum().item(),
                         top=[(s.tok.decode([token]), q) for q, token in likely]))
    return rows


# ---------------------------------------------------------------- states in place of thoughts

class Subject(NamedTuple):
    """A checkpoint that is looked into."""
    path: str
    label: str             # its folder
    script: ModuleType     # coconut, codi or simcot
    s: Setup
    stage: int             # what curriculum is asked for; None: a model of codi.py
    k: int                 # how many thoughts are read, or states in place of them


def place(s):
    """Where the states are that are read as thoughts, in words."""
    if s.flags.method in THINK:
        return "<bot>, thoughts"
    if s.flags.method in PAUSE:
        return "<bot>, pauses"
    return "first tokens written" if s.flags.method == "cot" else "last tokens of question"


def read_for(s, example, k, written=()):
    """What is read up to the place of the k-th thought: token ids, and how many of these, the last
    ones, are places (of models that think: the first place, <bot>; thoughts follow). written: the
    ids that the model writes after this question; they may be fewer than k."""
    if s.flags.method in THINK:
        return example.question + [s.tok.bot], 1
    if s.flags.method in PAUSE:
        return example.question + [s.tok.bot] + (k - 1) * [s.tok.pause], k
    if s.flags.method == "cot":
        return example.question + list(written[:k]), len(written[:k])
    return example.question, min(k, len(example.question))


def states_for(s, examples, k, written):
    """For each example the states (n, C) that are read in place of thoughts."""
    read = [read_for(s, e, k, own) for e, own in zip(examples, written)]
    batch = collate([Sequence(ids, 0, [s.tok.eos]) for ids, _ in read], s.tok.eos, s.machine.device)
    with s.machine.autocast():
        states = s.model(batch.prompt, keep=batch.keep, last=k)                     # (B, k, C)
    return [own[len(own) - n:] for own, (_, n) in zip(states, read)]


def answered(x, items, examples, batch_size=128):
    """What a Subject answers and holds. For each item: is it right; the ids that it wrote; the
    states (n, C) read as thoughts; for each of these a set, its five most probable tokens."""
    s = evaluation.with_limit(x.s, examples)
    if x.script is codi:
        sequences, *_ = codi.sides(s, examples).values()
    else:
        sequences = x.script.sequences_of(examples, x.stage, s)
    right, written, states, decoded = [], [], [], []
    for i in range(0, len(items), batch_size):
        part = slice(i, i + batch_size)
        ids, thoughts, latent = x.script.think_and_answer(s, sequences[part])
        if s.flags.method in THINK:
            found = [own[real] for own, real in zip(thoughts, latent)]
        else:
            found = states_for(s, examples[part], x.k, ids)
        top = iter(s.model.head(torch.cat(found).float()).topk(5).indices.tolist())     # (n, 5)
        for own in found:
            fives = [next(top) for _ in own]
            decoded.append([{comparison.bare(s.tok.decode([t])) for t in five} for five in fives])
        texts = map(s.tok.decode, ids)
        right += [scoring.is_correct(text, item["answer"]) for text, item in zip(texts, items[i:])]
        written += ids
        states += found
    return right, written, states, decoded


def attention(model, embeds):
    """How much each position of embeds (1, T, C) looks at each other: (T, T), rows sum to 1; the
    mean over layers and heads, computed again from the input of each block."""
    maps, at = [], torch.arange(embeds.size(1), device=embeds.device)[None]
    turned = [rotary(at, model.config)] if isinstance(model, Llama) else []
    for x, block in zip(model(embeds=embeds, all_states=True), model.h):
        q, k, _ = block.attn.heads(block.ln_1(x), *turned)
        k = k.repeat_interleave(q.size(1) // k.size(1), 1)
        scores = (q @ k.transpose(2, 3) / q.size(-1) ** 0.5)[0]                     # (H, T, T)
        future = torch.ones_like(scores[0], dtype=torch.bool).triu(1)
        maps.append(scores.masked_fill(future, -torch.inf).float().softmax(-1).mean(0))
    return torch.stack(maps).mean(0)


def looked_at(s, example, k, written=()):
    """For each of k thoughts of one example, or the states in place of them, the weights (n, T)
    that it puts on the T tokens of the question, at the position whose last state it is (the first
    thought: at <bot>)."""
    ids, n = read_for(s, example, k, written)
    x = s.model.wte(torch.tensor([ids], device=s.machine.device))
    if s.flags.method in THINK:
        for _ in range(k - 1):
            h = s.model(embeds=x, last=1)
            x = torch.cat([x, h if s.projection is None else s.projection(h)], 1)
        n = k
    return attention(s.model, x)[x.size(1) - n:, :len(example.question)]


# ---------------------------------------------------------------- the tables

def look(x, items, shown):
    """Print all tables of a Subject, item `shown` in full. Returns results, what line_plot takes
    for each plot, and the measures for comparison.side_by_side."""
    s, item = x.s, items[shown]
    examples = x.script.examples_of(s, "test", items)
    right, written, states, decoded = answered(x, items, examples)
    word = "thought" if s.flags.method in THINK else "state"
    if word == "state":
        print(f"--method {s.flags.method} has no thoughts; in their place {x.k} states are read, "
              f"at: {place(s)}\n")
    print(f"test item {shown + 1}: {item['question']}\nsteps: {' '.join(item['steps'])}\n")
    looks_at = looked_at(s, examples[shown], x.k, written[shown]).tolist()
    thoughts = shown_thoughts(x, examples[shown], states[shown], written[shown], looks_at)
    print_thoughts(thoughts, word)
    wanted = [comparison.results_of(item, s.tok) for item in items]
    table = comparison.agreement(wanted, right, decoded)
    comparison.print_agreement(table, right, word)

    results = dict(n=len(items), accuracy=float(np.mean(right)), thoughts=thoughts, agreement=table)
    steps_written = {}
    if s.decoder is not None:
        said, steps_written = explained(x, examples, states, right, shown)
        results["explained"] = said[shown]
    measures = {"method": s.flags.method, f"{x.k} states, at": place(s),
                "answered correctly": share(results["accuracy"], len(items)),
                **comparison.pooled(wanted, right, decoded), **steps_written}
    for i, row in enumerate(thoughts, 1):
        state = f"item {shown + 1}, state {i}"
        measures[f"{state}: likeliest token"] = likeliest(row["top"][:1])
        measures[f"{state}: looks most at"] = likeliest(row["attends_to"][:1])
    looks = {f"{word} {i}": list(enumerate(weight)) for i, weight in enumerate(looks_at, 1)}
    hits = {kind: [(m, r[kind]) for m, r in table.items()] for kind in ("all_steps", "swapped")}
    plots = [("looks-at", "looks at", "token of the question", "weight", looks),
             ("steps", "results of steps among the top 5", "steps", "share", hits, 1)]
    if x.script is codi:
        return results, plots, measures
    results["k"] = []
    if "edges" in item:
        results["k"] = search_tree(s, items, examples, shown)
        frontier.report(results["k"], len(items))
        plots += frontier.plots_of(results["k"])
        measures |= frontier.measures_of(results["k"], len(items))
    else:
        print("\nThe search tree needs items with a graph (prosqa, prosqa-mini); there is none "
              "here.")
    return results, plots, measures


def explained(x, examples, states, right, shown):
    """What the decoder of a model of simcot.py writes from the thoughts of each item, printed next
    to the steps: texts, and measures for comparison.side_by_side."""
    s = evaluation.with_limit(x.s, examples)
    steps = staged.held_steps(s, simcot.sequences_of(examples, x.stage, s))
    said = simcot.explain(s, torch.stack(states))
    return said, comparison.print_explained(steps, said, right, s.flags.data, shown)


def shown_thoughts(x, example, states, written, looks_at):
    """What is shown of each thought of one example, or state in place of it: decoded_thoughts;
    "attends_to", the five tokens of the question with the largest weights; and for a state "at",
    the token at its position."""
    s = x.s
    if x.script is not codi and s.flags.method in THINK:
        # all k, though --switch may have ended them earlier
        states = with_thoughts(s, [example], x.k, [], 0)[2][0]
    rows, pieces = decoded_thoughts(s, states), [s.tok.decode([t]) for t in example.question]
    for row, weight in zip(rows, looks_at):
        row["attends_to"] = sorted(zip(pieces, weight), key=lambda pair: -pair[1])[:5]
    if s.flags.method not in THINK:
        ids, n = read_for(s, example, x.k, written)
        for row, token in zip(rows, ids[len(ids) - n:]):
            row["at"] = s.tok.decode([token])
    return rows


def likeliest(pairs):
    return "  ".join(f"{piece!r} {100 * p:.0f} %" for piece, p in pairs)


def print_thoughts(rows, word):
    for i, row in enumerate(rows, 1):
        at = f"at {row['at']!r:9} " if "at" in row else ""
        print(f"{word} {i}  {at}norm {row['norm']:5.2f}  entropy {row['entropy']:4.2f}  "
              + likeliest(row["top"]))
        print("           looks at  " + likeliest(row["attends_to"]))


# ---------------------------------------------------------------- the search tree

def search_tree(s, items, examples, shown):
    """What a model of coconut.py says after k thoughts, and the values of nodes: the rows that
    frontier.report takes. Prints the tree of item `shown`."""
    flags, rows, graphs = s.flags, [], [Graph(item) for item in items]
    answers = [item["answer"] for item in items]
    once = flags.method not in (*THINK, *PAUSE)
    if once:
        print("\nNote: without thoughts or <pause> tokens the model is asked right after the "
              "question, whatever k is.")
    elif not flags.uniform_prob or flags.method in coconut.ONE_STAGE:
        print("\nNote: trained without stage mixing (--uniform-prob 0, or a method of one stage), "
              "so this model was never asked to speak after fewer thoughts than its last stage "
              "has; what follows says little.")
    for depth in range(flags.stage_max + 1):            # c thoughts replace one step
        k = depth * flags.c
        if depth == 0 or not once:
            outcomes = Counter(map(classify, spoken(s, examples, k), graphs, answers))
        row = dict(k=k, outcomes={name: outcomes[name] / len(items) for name in OUTCOMES})
        if depth == 1 or (depth > 1 and not once):
            values = node_values(s, items, examples, k)
            unit = "<pause> token" if flags.method in PAUSE else "thought"
            print(f"\nafter {k} {unit}{'s' if k > 1 else ''}: value of each node, the probability "
                  "of its name after 'Every'")
            print("\n".join(tree_lines(graphs[shown], values[shown])))
        if depth:
            row |= dict(values=values[shown], frontier=frontier_summary(graphs, values, depth),
                        height=height_summary(graphs, values, depth), cumulated=cumulated(values))
        rows.append(row)
    return rows


# ---------------------------------------------------------------- several checkpoints

def opened(paths, changed):
    """The Subjects of checkpoints, some settings changed. Two never have the same label."""
    subjects = []
    for path in paths:
        stage = None
        own = weights.load_checkpoint(path)["flags"]
        if "n_latent" in own:
            script, s = codi, codi.trained_model(path, changed)
            k = s.flags.n_latent
        else:
            script = simcot if "step_weight" in own else coconut
            s, stage = script.trained_model(path, changed)
            k = s.flags.stage_max * s.flags.c
        folder, file = os.path.split(os.path.abspath(path))
        label = os.path.basename(folder) + ("" if file == "best.pt" else f"/{file}")
        if label in [x.label for x in subjects]:
            label = f"{label} ({len(subjects) + 1})"
        subjects.append(Subject(path, label, script, s, stage, k))
    return subjects


def aligned(subjects):
    """The Subjects with as many places each: one without places of its own, as of --method cot,
    gets those of the others. Raises UserError if these differ, or there are none."""
    own = [x for x in subjects if x.s.flags.method in (*THINK, *PAUSE)] or subjects[:1]
    first, *others = sorted(own, key=lambda x: x.script is codi)
    if not first.k:
        raise UserError(f"{first.path} has no continuous thoughts to look into, as it was trained "
                        f"with {numbers(first)}; give a model that has some.")
    for x in others:
        alike = (x.script is codi) == (first.script is codi)
        if x.k != first.k or alike and numbers(x) != numbers(first):
            raise UserError(f"{x.path} was trained with {numbers(x)}, {first.path} with "
                            f"{numbers(first)}, so their tables would not line up; give models "
                            "with equally many thoughts.")
    found = []
    for x in subjects:
        flags = vars(x.s.flags)
        if codi not in (x.script, first.script):
            flags = flags | dict(stage_max=first.s.flags.stage_max, c=first.s.flags.c)
        found.append(x._replace(k=first.k, s=x.s._replace(flags=argparse.Namespace(**flags))))
    return found


def numbers(x):
    """The settings of a Subject that say how many thoughts it has."""
    flags = x.s.flags
    if x.script is codi:
        return f"--n-latent {flags.n_latent}"
    return f"--stage-max {flags.stage_max} --c {flags.c}"


def folders_of(subjects, out):
    """Where the results of each Subject go: next to it, or into `out`. Raises UserError if those of
    two would be one file."""
    if out and len(subjects) == 1:
        return [out]
    if out:
        return [os.path.join(out, x.label.replace("/", "-")) for x in subjects]
    folders, path_of = [os.path.dirname(x.path) or "." for x in subjects], {}
    for folder, x in zip(folders, subjects):
        other = path_of.setdefault(folder, x.path)
        if other != x.path:
            raise UserError(f"{other} and {x.path} are in one folder, where both would write "
                            "probe.json; give another folder with --out.")
    return folders


# ---------------------------------------------------------------- main

@torch.no_grad()
def main(argv=None):
    p = argparse.ArgumentParser(usage="python probe.py CKPT [CKPT ..] [flags]", description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    add = p.add_argument
    add("checkpoints", metavar="CKPT", nargs="+",
        help="best.pt or last.pt of a run of coconut.py, codi.py or simcot.py; several: side by "
             "side")
    add("--data", help="data set (default: the one it was trained on); its test split is used")
    add("--n", type=count(1), default=500, help="test items (default 500)")
    add("--item", type=count(1), default=1, help="test item that is shown in full (default 1)")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    add("--out", help="folder for probe.json and figures (default: that of the checkpoint)")
    add("--plot", action="store_true", help="also draw figures, thoughts-*.svg")
    args = p.parse_args(argv)
    changed = dict(device=args.device, compile=False)
    if args.data:
        changed["data"] = args.data
    subjects = aligned(opened(args.checkpoints, changed))
    items = data_prep.load(subjects[0].s.flags.data, need=("test",))["test"][:args.n]
    if args.item > len(items):
        raise UserError(f"--item {args.item}: there are {len(items)} test items; choose one of "
                        "them.")
    comparison.check_comparable(subjects, items)
    columns = []
    for x, out in zip(subjects, folders_of(subjects, args.out)):
        if len(subjects) > 1:
            print(f"\n{'-' * 16} {x.label}\n")
        with contextlib.nullcontext() if x.script is codi else x.s.machine.autocast():
            results, plots, measures = look(x, items, args.item - 1)
        columns.append((x.label, x.s.flags.method in THINK, measures))
        where = dict(checkpoint=x.path, data=x.s.flags.data, item=args.item)
        data_prep.write_json(os.path.join(out, "probe.json"), where | results)
        print(f"\nwrote {os.path.join(out, 'probe.json')}")
        for name, *plot in plots if args.plot else ():
            line_plot(os.path.join(out, f"thoughts-{name}.svg"), *plot)
            print(f"wrote {os.path.join(out, f'thoughts-{name}.svg')}")
    if len(subjects) > 1:
        comparison.side_by_side(columns)


if __name__ == "__main__":
    runtime.run_main(main)
