"""What continuous thoughts hold: a look inside a trained Coconut or CODI model.

    python probe.py out/prosqa-mini-coconut-0/best.pt
    python probe.py out/chains-mixed-codi-0/best.pt

Of both: each thought decoded through the head. Of Coconut (Hao et al. 2024, section 5), if it was
trained with --uniform-prob and the data has graphs (ProsQA), also what it says after k thoughts,
one of OUTCOMES, and
  - the search tree: the value of a node is the probability that its name comes after "Every"; does
    the model follow one path, or several?
  - the value of nodes by their height (steps to the nearest leaf), for nodes that lead to the
    target and nodes that do not: is the difference clear only near the leaves?
Of CODI (Shen et al. 2025, table 3 and figure 5):
  - are the results of the steps among the five tokens that a thought is closest to?
  - which tokens of the question does each thought look at?
"""

import argparse
import os
import re
from collections import Counter

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

import coconut
import codi
import data_prep
from common import runtime, scoring, weights
from common.evaluation import limit
from common.figure import line_plot
from common.frontier import (OUTCOMES, PERCENTILES, SIDES, Graph, classify, cumulated,
                             frontier_summary, height_summary, tree_lines)
from common.runtime import UserError, count
from common.text import Sequence, collate
from gpt2 import StaticCache

# ---------------------------------------------------------------- what the model is asked

def with_thoughts(s, examples, k, language, room):
    """Read question, <bot>, k thoughts and `language` (ids). s: experiment.Setup. Returns the cache
    with `room` columns left, the last state (B, C) and the thoughts (B, k, C)."""
    sequences = [Sequence(e.question + [s.tok.bot], k, language) for e in examples]
    batch = collate(sequences, s.tok.eos, s.machine.device)
    size = batch.prompt.size(1) + k + len(language) + room
    cache = StaticCache(s.model.config, len(sequences), size, s.machine.device, s.machine.dtype)
    x, keep, thoughts = coconut.think(s.model, cache, batch.prompt, batch.keep, batch.latent)
    return cache, coconut.read_on(s.model, cache, x, keep, batch.language)[:, -1], thoughts


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


def node_values(s, items, examples, k, batch_size=32):
    """The value of every node of every item after k thoughts: a list of lists (section 5.2)."""
    every, values = s.tok.encode("Every"), []

    def name_ids(name):              # with " is a" where the tokenizer joins that to the name
        short, long = (s.tok.encode(f"Every {name}{rest}") for rest in ("", " is a"))
        return (short if long[:len(short)] == short else long)[len(every):]
    for i in range(0, len(items), batch_size):
        chunk = slice(i, i + batch_size)
        names = [list(map(name_ids, item["idx_to_symbol"])) for item in items[chunk]]
        room = max(map(len, sum(names, [])))
        cache, h, _ = with_thoughts(s, examples[chunk], k, [s.tok.eot] + every, room)
        values += name_probabilities(s.model, cache, h, names)
    return values


def spoken(s, examples, k, batch_size=128):
    """What the model writes after k thoughts: a list of texts."""
    texts = []
    for i in range(0, len(examples), batch_size):
        cache, h, _ = with_thoughts(s, examples[i:i + batch_size], k, [s.tok.eot], limit(s))
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


# ---------------------------------------------------------------- Coconut

def probe_coconut(s, items, args):
    """The tables of a Coconut model. Returns results, and what line_plot takes for each plot."""
    flags, shown = s.flags, args.item - 1
    k_max = flags.stage_max * flags.c
    if flags.method not in coconut.FEEDS_BACK or not k_max:
        raise UserError(f"{args.checkpoint} was trained with --method {flags.method} and has no "
                        "continuous thoughts to look into; give a model of --method coconut.")
    examples = coconut.examples_of(s, "test", items)
    print(f"test item {args.item}: {items[shown]['question']}\n")
    _, _, thoughts = with_thoughts(s, examples[shown:shown + 1], k_max, [s.tok.eot], 0)
    results = dict(n=len(items), thoughts=decoded_thoughts(s, thoughts[0]), k=[])
    print_thoughts(results["thoughts"])
    if "edges" not in items[0]:
        print("\nThe search tree needs items with a graph (prosqa, prosqa-mini); there is none "
              "here.")
        return results, []
    if not flags.uniform_prob:
        print("\nNote: trained without stage mixing (--uniform-prob 0), so this model was never "
              "asked to speak after fewer thoughts than its last stage has; what follows says "
              "little.")
    graphs = [Graph(item) for item in items]
    for depth in range(flags.stage_max + 1):            # c thoughts replace one step
        k = depth * flags.c
        said = zip(spoken(s, examples, k), graphs, items)
        outcomes = Counter(classify(text, graph, item["answer"]) for text, graph, item in said)
        row = dict(k=k, outcomes={name: outcomes[name] / len(items) for name in OUTCOMES})
        if k:
            values = node_values(s, items, examples, k)
            row |= dict(values=values[shown], frontier=frontier_summary(graphs, values, depth),
                        height=height_summary(graphs, values, depth), cumulated=cumulated(values))
            print(f"\nafter {k} thought{'s' if k > 1 else ''}: value of each node, the probability "
                  "of its name after 'Every'")
            print("\n".join(tree_lines(graphs[shown], values[shown])))
        results["k"].append(row)
    report(results)
    return results, plots_of(results["k"][1:])


def report(results):
    """The tables over all items."""
    print(f"\n{results['n']} test items. The frontier after k thoughts (k / c steps): nodes so "
          "many steps from the root, where they are two or more")
    line = "{:>3} {:>6} {:>8} {:>10} {:>11} {:>16} {:>8}".format
    print(line("k", "items", "nodes", "mass, %", "effective", "to the target, %", "chance"))
    for row in results["k"][1:]:
        f = row["frontier"]
        print(line(row["k"], f["n"], f"{f['size']:.2f}", percent(f["mass"]),
                   f"{f['effective']:.2f}", percent(f["right"]), percent(f["chance"])))
    print("\nmean value of frontier nodes by height (steps to the nearest leaf), in %, with their "
          "number")
    for row in results["k"][1:]:
        cells = []
        for height, sides in row["height"].items():
            means = [f"{side} {percent(mean)} ({n})" for side, (mean, n) in sides.items() if n]
            cells.append(f"height {height}: " + ", ".join(means))
        print(f"  k = {row['k']}   " + "   ".join(cells))
    print("\ncumulative value of the best nodes, in %, at percentiles "
          f"{', '.join(map(str, PERCENTILES))} of the items")
    for row in results["k"][1:]:
        cells = [f"top {n}: {' '.join(f'{100 * v:.0f}' for v in curve)}"
                 for n, curve in row["cumulated"].items()]
        print(f"  k = {row['k']}   " + "   ".join(cells))
    print("\nin words after k thoughts, % of the items")
    line = ("{:>3}" + " {:>15}" * len(OUTCOMES)).format
    print(line("k", *OUTCOMES))
    for row in results["k"]:
        print(line(row["k"], *(percent(row["outcomes"][name]) for name in OUTCOMES)))


def plots_of(rows):
    """After each k the cumulative value by percentile and the value by height."""
    plots = []
    for row in rows:
        k = row["k"]
        best = {f"top {n}": list(zip(PERCENTILES, v)) for n, v in row["cumulated"].items()}
        sides = {side: [(height, found[side][0]) for height, found in row["height"].items()
                        if found[side][1]]
                 for side in SIDES}
        plots += [(f"{k}-best", f"k = {k}", "percentile of questions", "cumulative value", best, 1),
                  (f"{k}-height", f"k = {k}", "steps to the nearest leaf", "value", sides, 1)]
    return plots


# ---------------------------------------------------------------- CODI

def result_of(step):
    """What a step writes after its last '=': <<2*8-9=7>> -> '7'; None if there is nothing."""
    found = re.search(r"=\s*([^=<>]*?)\s*(?:>>|$)", step.strip())
    return found[1] if found and found[1] else None


def agreement(items, right, decoded):
    """Are the steps' results among the tokens of the thoughts (table 3)? {number of steps: dict}.

    right: was the item answered correctly; decoded: for each item a list of sets, the five most
    probable tokens of each thought (stripped text). Of the n correctly answered items: all_steps:
    share of results among the tokens of some thought; intermediate: without the last step, whose
    result is the answer; swapped: with the thoughts of the next such item, what chance gives.
    """
    rows = {}
    for m in sorted({len(item["steps"]) for item in items}):
        chosen = [i for i, item in enumerate(items) if len(item["steps"]) == m and right[i]]
        found = {"all_steps": [], "intermediate": [], "swapped": []}
        for i, other in zip(chosen, chosen[1:] + chosen[:1]):
            for j, result in enumerate(map(result_of, items[i]["steps"])):
                if result is None:
                    continue
                found["all_steps"].append(any(result in tokens for tokens in decoded[i]))
                found["swapped"].append(any(result in tokens for tokens in decoded[other]))
                if j + 1 < m:
                    found["intermediate"].append(found["all_steps"][-1])
        if found["all_steps"]:
            means = {name: float(np.mean(hits)) if hits else None for name, hits in found.items()}
            rows[m] = dict(n=len(chosen), **means)
    return rows


def attention(model, embeds):
    """How much each position of embeds (1, T, C) looks at each other: (T, T), rows sum to 1; the
    mean over layers and heads, computed again from the input of each block."""
    maps = []
    for x, block in zip(model(embeds=embeds, all_states=True), model.h):
        q, k, _ = (t.unflatten(2, (model.config.n_head, -1)).transpose(1, 2)
                   for t in block.attn.c_attn(block.ln_1(x)).chunk(3, 2))
        scores = (q @ k.transpose(2, 3) / q.size(-1) ** 0.5)[0]                     # (H, T, T)
        future = torch.ones_like(scores[0], dtype=torch.bool).triu(1)
        maps.append(scores.masked_fill(future, -torch.inf).float().softmax(-1).mean(0))
    return torch.stack(maps).mean(0)


def looked_at(s, example, n):
    """For each of n thoughts of one example the weights (n, T) that it puts on the T tokens of the
    question, at the position whose last state is the thought (the first at <bot>)."""
    x = s.model.wte(torch.tensor([example.question + [s.tok.bot]], device=s.machine.device))
    for _ in range(n - 1):
        x = torch.cat([x, s.projection(s.model(embeds=x, last=1))], 1)
    T = len(example.question)
    return attention(s.model, x)[T:T + n, :T]


def probe_codi(s, items, args):
    """The same of a CODI model."""
    flags, shown = s.flags, args.item - 1
    if flags.method != "codi" or not flags.n_latent:
        raise UserError(f"{args.checkpoint} has no continuous thoughts to look into; give a model "
                        "of --method codi with thoughts.")
    examples = codi.examples_of(s, "test", items)
    right, decoded = [], []
    for i in range(0, len(items), 128):
        students = [codi.sequences(e, flags, s.tok)[0] for e in examples[i:i + 128]]
        written, states, _ = codi.think_and_answer(s, students)
        texts = map(s.tok.decode, written)
        right += [scoring.is_correct(text, item["answer"]) for text, item in zip(texts, items[i:])]
        for top in s.model.head(states.float()).topk(5).indices.tolist():           # (n, 5)
            decoded.append([{s.tok.decode([t]).strip() for t in five} for five in top])
        if i <= shown < i + 128:
            thoughts = decoded_thoughts(s, states[shown - i])
    print(f"test item {args.item}: {items[shown]['question']}\n"
          f"steps: {' '.join(items[shown]['steps'])}\n")
    pieces = [s.tok.decode([t]) for t in examples[shown].question]
    weights = looked_at(s, examples[shown], flags.n_latent).tolist()
    for row, weight in zip(thoughts, weights):
        row["attends_to"] = sorted(zip(pieces, weight), key=lambda pair: -pair[1])[:5]
    print_thoughts(thoughts)
    table = agreement(items, right, decoded)
    print(f"\n{len(items)} test items, {percent(np.mean(right))} % answered correctly. Of those: "
          "results of steps among the top 5 tokens of some thought, in %")
    line = "{:>6} {:>7} {:>10} {:>19} {:>29}".format
    print(line("steps", "items", "all steps", "without the last", "with another item's thoughts"))
    for m, r in table.items():
        print(line(m, r["n"], *(percent(r[k]) for k in ("all_steps", "intermediate", "swapped"))))
    if not table:
        print("(no step of this data writes a result after '=')")
    looks = {f"thought {i}": list(enumerate(weight)) for i, weight in enumerate(weights, 1)}
    hits = {name: [(m, r[name]) for m, r in table.items()] for name in ("all_steps", "swapped")}
    results = dict(n=len(items), accuracy=float(np.mean(right)), thoughts=thoughts, agreement=table)
    return results, [("looks-at", "looks at", "token of the question", "weight", looks),
                     ("steps", "results of steps among the top 5", "steps", "share", hits, 1)]


# ---------------------------------------------------------------- main

def percent(share):
    return "-" if share is None else f"{100 * share:.1f}"


def print_thoughts(rows):
    def likeliest(pairs):
        return "  ".join(f"{piece!r} {100 * p:.0f} %" for piece, p in pairs)

    for i, row in enumerate(rows, 1):
        print(f"thought {i}  norm {row['norm']:5.2f}  entropy {row['entropy']:4.2f}  "
              + likeliest(row["top"]))
        if "attends_to" in row:
            print("           looks at  " + likeliest(row["attends_to"]))


@torch.no_grad()
def main(argv=None):
    p = argparse.ArgumentParser(usage="python probe.py CKPT [flags]", description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    add = p.add_argument
    add("checkpoint", metavar="CKPT", help="best.pt or last.pt of a run of coconut.py or codi.py")
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
    of_codi = "n_latent" in weights.load_checkpoint(args.checkpoint)["flags"]
    if of_codi:
        s = codi.trained_model(args.checkpoint, changed)
    else:
        s, _ = coconut.trained_model(args.checkpoint, changed)
    items = data_prep.load(s.flags.data, need=("test",))["test"][:args.n]
    if args.item > len(items):
        raise UserError(f"--item {args.item}: there are {len(items)} test items; choose one of "
                        "them.")
    if of_codi:
        results, plots = probe_codi(s, items, args)
    else:
        with s.machine.autocast():
            results, plots = probe_coconut(s, items, args)
    out = args.out or os.path.dirname(args.checkpoint) or "."
    where = dict(checkpoint=args.checkpoint, data=s.flags.data, item=args.item)
    data_prep.write_json(os.path.join(out, "probe.json"), where | results)
    print(f"\nwrote {os.path.join(out, 'probe.json')}")
    for name, *plot in plots if args.plot else ():
        line_plot(os.path.join(out, f"thoughts-{name}.svg"), *plot)
        print(f"wrote {os.path.join(out, f'thoughts-{name}.svg')}")


if __name__ == "__main__":
    runtime.run_main(main)
