"""What continuous thoughts hold: a look inside a trained Coconut or CODI model.

    python probe.py out/prosqa-mini-coconut-0/best.pt
    python probe.py out/chains-mixed-codi-0/best.pt

Of both: each thought decoded through the head. Of Coconut (Hao et al. 2024, section 5) on ProsQA data, whose items
carry their graph, also
  - the search tree: after k thoughts the model is made to speak, and the value of a node is the
    probability that its name comes after "Every": does the model follow one path, or several at once?
  - the value of nodes by their height (steps to the nearest leaf), for nodes that lead to the target
    and nodes that do not: is the difference clear only near the leaves?
  - what the model says when it must go on in words after k thoughts: correct path, longer path,
    hallucination, wrong target, or only a label.
A model speaks in the middle of its thoughts only if it was trained with stage mixing (--uniform-prob).
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

import codi
import coconut
import data_prep
import runtime
from gpt2 import StaticCache
from runtime import UserError
from soft_thinking import pyplot

OUTCOMES = ("Correct Path", "Longer Path", "Hallucination", "Wrong Target", "Correct Label", "Incorrect Label")
CUMULATED = (1, 2, 3)                 # candidates
PERCENTILES = (10, 25, 50, 75, 90)


# ---------------------------------------------------------------- graphs

class Graph:
    """The graph of one ProsQA item, with what the probe asks of it.

    depth {node: distance from the root}, height {node: distance to the nearest leaf below it},
    reaches: the nodes from which the target can be reached, itself included.
    """

    def __init__(self, item):
        self.names, self.root, self.target = item["idx_to_symbol"], item["root"], item["target"]
        self.number = {name: i for i, name in enumerate(self.names)}
        self.edges = {tuple(edge) for edge in item["edges"]}
        self.children, parents = data_prep.adjacency(item["edges"]), data_prep.adjacency(item["edges"], reverse=True)
        self.depth = data_prep.shortest_paths(self.children, self.root)[0]
        self.reaches = data_prep.shortest_paths(parents, self.target)[0].keys()
        self.height = {v: min(d for w, d in data_prep.shortest_paths(self.children, v)[0].items() if not self.children[w])
                       for v in range(len(self.names))}


def classify(text, graph, answer):
    """One of OUTCOMES for what a model wrote after its thoughts (section 5.1).

    Steps are the sentences before the answer marker. They make a path if each starts where the one
    before ended and the first starts at a node below the root (the thoughts may have led there) or at
    the root. The path is correct if it ends at the target and is, with the way from the root to its
    start, as short as the shortest; else longer. A sentence that is no edge is a hallucination.
    Without sentences the label counts: the answer alone.
    """
    sentences = [line for line in text.split("###")[0].split("\n") if line.strip()]
    if not sentences:
        return "Correct Label" if data_prep.is_correct(text, answer) else "Incorrect Label"
    path = []
    for sentence in sentences:
        found = re.fullmatch(r"(?:Every )?(\w+) is an? (\w+)\.", sentence.strip())
        edge = tuple(graph.number.get(name) for name in found.groups()) if found else None
        if edge not in graph.edges or (path and path[-1] != edge[0]) or (not path and edge[0] not in graph.depth):
            return "Hallucination"
        path += edge if not path else edge[1:]
    if path[-1] != graph.target:
        return "Wrong Target"
    shortest = graph.depth[path[0]] + len(path) - 1 == graph.depth[graph.target]
    return "Correct Path" if shortest else "Longer Path"


# ---------------------------------------------------------------- what the model is asked

def with_thoughts(model, examples, k, language, tok, machine, room):
    """Read question, <bot>, k thoughts and `language` (ids). Returns the cache with `room` columns
    left, the last state (B, C) and the thoughts (B, k, C)."""
    rows = [data_prep.Sequence(e.question + [tok.bot], k, language) for e in examples]
    batch = data_prep.collate(rows, tok.eos, machine.device)
    size = batch.prompt.size(1) + k + len(language) + room
    cache = StaticCache(model.config, len(rows), size, machine.device, machine.dtype)
    x, keep, thoughts = coconut.think(model, cache, batch.prompt, batch.keep, batch.latent)
    return cache, coconut.read_on(model, cache, x, keep, batch.language)[:, -1], thoughts


def name_probabilities(model, cache, h, names):
    """Probability of each name: the product of those of all its tokens.

    h (B, C): the state that predicts a name's first token, its context in `cache`; names: for each
    row a list of token-id lists. Returns a list of B lists. Names share the context, read once.
    """
    N, L = max(map(len, names)), max(len(ids) for row in names for ids in row)
    ids, real = np.zeros((len(names), N, L), int), np.zeros((len(names), N, L), bool)
    for b, row in enumerate(names):
        for n, name in enumerate(row):
            ids[b, n, :len(name)], real[b, n, :len(name)] = name, True
    ids, real = torch.from_numpy(ids).to(h.device), torch.from_numpy(real).to(h.device)
    logs = model.head(h).float().log_softmax(-1).gather(1, ids[:, :, 0])                   # (B, N)
    if L > 1:
        ids, real = ids.flatten(0, 1), real.flatten(0, 1)                                  # (B N, L)
        states = model(ids[:, :-1], cache=cache.repeat(N), keep=real[:, 1:])
        rest = model.head(states).float().log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]
        logs = logs + (rest * real[:, 1:]).sum(1).view(logs.shape)
    return [row[:len(own)] for row, own in zip(logs.exp().tolist(), names)]


def node_values(model, items, examples, k, tok, machine, batch_size=32):
    """The value of every node of every item after k thoughts: a list of lists (section 5.2)."""
    def name_ids(name):      # with " is a" where the tokenizer joins that to the name
        short, long = tok.encode(f"Every {name}"), tok.encode(f"Every {name} is a")
        return (short if long[:len(short)] == short else long)[len(every):]
    every, values = tok.encode("Every"), []
    for i in range(0, len(items), batch_size):
        chunk = items[i:i + batch_size]
        names = [[name_ids(name) for name in item["idx_to_symbol"]] for item in chunk]
        room = max(len(ids) for row in names for ids in row)
        cache, h, _ = with_thoughts(model, examples[i:i + batch_size], k, [tok.eot] + every, tok, machine, room)
        values += name_probabilities(model, cache, h, names)
    return values


def spoken(model, examples, k, tok, machine, max_new, batch_size=128):
    """What the model writes after k thoughts: a list of texts."""
    texts = []
    for i in range(0, len(examples), batch_size):
        cache, h, _ = with_thoughts(model, examples[i:i + batch_size], k, [tok.eot], tok, machine, max_new)
        texts += [tok.decode(row) for row in model.decode(cache, h, max_new, tok.eos)]
    return texts


def decoded_thoughts(model, example, k, tok, machine):
    """For each thought of one example: norm, entropy in nats of its distribution through the head, top 5."""
    return thought_rows(model, with_thoughts(model, [example], k, [tok.eot], tok, machine, 0)[2][0].float(), tok)


def thought_rows(model, thoughts, tok):
    """For each of thoughts (k, C), as they are before any projection, what decoded_thoughts says."""
    rows = []
    for thought in thoughts:
        p = model.head(thought).softmax(-1)
        top = p.topk(5)
        rows.append(dict(norm=thought.norm().item(), entropy=torch.special.entr(p).sum().item(),
                         top=[(tok.decode([t]), q) for q, t in zip(top.values.tolist(), top.indices.tolist())]))
    return rows


# ---------------------------------------------------------------- summaries

def frontier_summary(graphs, values, depth):
    """How the values lie on the frontier, the nodes as many steps from the root as were thought; means over
    the items that have one of at least two nodes, one of which leads to the target. Returns a dict:

    n, size of the frontier, mass (sum of its values), effective (exp of the entropy of its values
    taken as a distribution: 1 is one path, `size` is all alike), right (share of that distribution on
    nodes that lead to the target), chance (share of such nodes among the frontier's).
    """
    rows = []
    for graph, value in zip(graphs, values):
        nodes = [v for v, d in graph.depth.items() if d == depth]
        good = [v in graph.reaches for v in nodes]
        if len(nodes) < 2 or not any(good):
            continue
        p = np.array([value[v] for v in nodes])
        q = p / max(p.sum(), 1e-30)
        rows.append((len(nodes), p.sum(), np.exp(-(q * np.log(np.maximum(q, 1e-30))).sum()), q[good].sum(), np.mean(good)))
    means = np.mean(rows, axis=0).tolist() if rows else [float("nan")] * 5
    return dict(n=len(rows), **dict(zip(("size", "mass", "effective", "right", "chance"), means)))


def height_summary(graphs, values, depth):
    """{height: {"leads to target": (mean value, nodes), "does not": ..}} of the frontier."""
    found = {}
    for graph, value in zip(graphs, values):
        for v in (v for v, d in graph.depth.items() if d == depth):
            side = "leads to target" if v in graph.reaches else "does not"
            found.setdefault(graph.height[v], {"leads to target": [], "does not": []})[side].append(value[v])
    return {h: {side: (float(np.mean(x)) if x else None, len(x)) for side, x in sides.items()} for h, sides in sorted(found.items())}


def cumulated(values):
    """{1: .., 2: .., 3: ..}: percentiles over the items of the summed value of the best 1, 2, 3 nodes."""
    best = [np.cumsum(sorted(value, reverse=True)) for value in values]
    return {n: np.percentile([b[min(n, len(b)) - 1] for b in best], PERCENTILES).tolist() for n in CUMULATED}


def tree_lines(graph, value, width=20):
    """The nodes below the root as a tree with their values as bars; a node with two parents stands once."""
    lines, seen = [f"{graph.names[graph.root]}"], {graph.root}

    def below(node, indent):
        fresh = [v for v in graph.children[node] if graph.depth[v] == graph.depth[node] + 1 and v not in seen]
        seen.update(fresh)
        for v in fresh:
            last, goal = v == fresh[-1], " = target" if v == graph.target else " leads to target" if v in graph.reaches else ""
            label = f"{indent}{'└' if last else '├'}─ {graph.names[v]}"
            lines.append(f"{label:24} {value[v]:6.3f} {'█' * round(width * value[v]):{width}}{goal}".rstrip())
            below(v, indent + ("   " if last else "│  "))
    below(graph.root, "")
    return lines


# ---------------------------------------------------------------- CODI

def result_of(step):
    """The result that a step writes: what stands after its last '=', as in <<2*8-9=7>> -> '7'; None if it writes none."""
    found = re.search(r"=\s*([^=<>]*?)\s*(?:>>|$)", step.strip())
    return found[1] if found and found[1] else None


def agreement(items, right, decoded):
    """Are the steps' results among the tokens of the thoughts (table 3)? {number of steps: dict}.

    items: test items; right: was the item answered correctly; decoded: for each item a list of sets, the
    five most probable tokens of each thought (stripped text). Of the correctly answered items with that many steps:
    n; all_steps, the share of their steps' results that stand among the five tokens of some thought;
    intermediate, the same without each item's last step, whose result is the answer (None if there is
    no other); swapped, that of all_steps with the thoughts of the next such item: what chance gives.
    """
    rows = {}
    for m in sorted({len(item["steps"]) for item in items}):
        chosen = [i for i, item in enumerate(items) if len(item["steps"]) == m and right[i]]
        found = {"all_steps": [], "intermediate": [], "swapped": []}
        for i, other in zip(chosen, chosen[1:] + chosen[:1]):
            for j, result in enumerate(map(result_of, items[i]["steps"])):
                if result is None:
                    continue
                hit = any(result in tokens for tokens in decoded[i])
                found["all_steps"].append(hit)
                found["swapped"].append(any(result in tokens for tokens in decoded[other]))
                if j + 1 < m:
                    found["intermediate"].append(hit)
        if found["all_steps"]:
            rows[m] = dict(n=len(chosen), **{name: float(np.mean(hits)) if hits else None for name, hits in found.items()})
    return rows


def attention(model, embeds):
    """How much each position looks at each other: (T, T), rows sum to 1; the mean over layers and heads.

    embeds (1, T, C). The weights are computed again from the input of each block, as Attention does.
    """
    states, maps = model(embeds=embeds, all_states=True), []
    T, future = embeds.size(1), torch.ones(embeds.size(1), embeds.size(1), dtype=torch.bool, device=embeds.device).triu(1)
    for x, block in zip(states, model.h):
        q, k, _ = (t.unflatten(2, (model.config.n_head, -1)).transpose(1, 2) for t in block.attn.c_attn(block.ln_1(x)).chunk(3, 2))
        scores = (q @ k.transpose(2, 3) / q.size(-1) ** 0.5)[0].masked_fill(future, -torch.inf)         # (H, T, T)
        maps.append(scores.float().softmax(-1).mean(0))
    return torch.stack(maps).mean(0).view(T, T)


def looked_at(model, projection, example, n, tok):
    """For each of n thoughts of one example the weights (n, T) that it puts on the T tokens of the question,
    at the position whose last state is the thought (the first at <bot>)."""
    prompt = torch.tensor([example.question + [tok.bot]], device=model.wte.weight.device)
    x = model.wte(prompt)
    for _ in range(n - 1):
        x = torch.cat([x, projection(model(embeds=x, last=1))], 1)
    T = len(example.question)
    return attention(model, x)[T:T + n, :T]


def probe_codi(args, plt):
    """The tables for a model of codi.py."""
    state = runtime.load_checkpoint(args.checkpoint)
    flags = argparse.Namespace(**codi.DEFAULTS | state["flags"] | (dict(data=args.data) if args.data else {}))
    if flags.method != "codi" or not flags.n_latent:
        raise UserError(f"{args.checkpoint} has no continuous thoughts to look into; give a model of --method codi with thoughts.")
    machine = runtime.Machine(args.device, flags.dtype, state["config"]["n_embd"])
    model, tok, projection = codi.from_checkpoint(state)
    model.to(machine.device).eval(), projection.to(machine.device).eval()
    items = test_items(flags, args)
    examples = codi.tokenize(items, tok, model, flags, f"{flags.data}, test.json")
    right, decoded, shown = [], [], args.item - 1
    for i in range(0, len(items), 128):
        rows = [codi.sequences(e, flags, tok)[0] for e in examples[i:i + 128]]
        answers, states = codi.answer(model, projection, rows, tok, flags, machine)
        right += [data_prep.is_correct(tok.decode(a), item["answer"]) for a, item in zip(answers, items[i:i + 128])]
        top = model.head(states.float()).topk(5).indices.tolist()                       # (B, n, 5)
        decoded += [[{tok.decode([t]).strip() for t in five} for five in row] for row in top]
        if i <= shown < i + 128:
            thoughts = thought_rows(model, states[shown - i].float(), tok)
    results = dict(checkpoint=args.checkpoint, data=flags.data, n=len(items), item=args.item, accuracy=float(np.mean(right)),
                   thoughts=thoughts, agreement=agreement(items, right, decoded))
    print(f"test item {args.item}: {items[shown]['question']}\nsteps: {' '.join(items[shown]['steps'])}\n")
    weights = looked_at(model, projection, examples[shown], flags.n_latent, tok)
    pieces = [tok.decode([t]) for t in examples[shown].question]
    for i, row in enumerate(thoughts):
        top = weights[i].topk(min(5, len(pieces)))
        row["attends_to"] = [(pieces[j], w) for w, j in zip(top.values.tolist(), top.indices.tolist())]
        print_thought(i + 1, row)
        print("           looks at  " + "  ".join(f"{piece!r} {100 * w:.0f} %" for piece, w in row["attends_to"]))
    print(f"\n{len(items)} test items, {100 * np.mean(right):.1f} % answered correctly. Of those: results of steps among the top 5 "
          "tokens of some thought, in %")
    line = "{:>6} {:>7} {:>10} {:>19} {:>29}".format
    print(line("steps", "items", "all steps", "without the last", "with another item's thoughts"))
    percent = lambda share: "-" if share is None else f"{100 * share:.1f}"
    for m, r in results["agreement"].items():
        print(line(m, r["n"], percent(r["all_steps"]), percent(r["intermediate"]), percent(r["swapped"])))
    if not results["agreement"]:
        print("(no step of this data writes a result after '=')")
    out = save(results, args)
    if plt:
        figure, (left, below) = plt.subplots(2, 1, figsize=(max(6, len(pieces) / 3), 7))
        left.imshow(weights.float().cpu(), aspect="auto", cmap="Blues")
        left.set(yticks=range(flags.n_latent), yticklabels=[f"thought {i + 1}" for i in range(flags.n_latent)], title="looks at")
        left.set_xticks(range(len(pieces)), pieces, rotation=90)
        for name in ("all_steps", "swapped"):
            below.plot(list(results["agreement"]), [100 * r[name] for r in results["agreement"].values()], marker="o", label=name)
        below.set(xlabel="steps", ylabel="results among the top 5, %", ylim=(0, 100))
        below.legend()
        write_figure(figure, out)


# ---------------------------------------------------------------- main

def plot(results, folder, plt):
    """thoughts.png and .svg: cumulative values by percentile and value by height, per k."""
    ks = [k for k in results["k"] if k["k"] > 0]
    figure, axes = plt.subplots(2, len(ks), figsize=(4 * len(ks), 7), squeeze=False, sharey="row")
    for column, row in enumerate(ks):
        for n, curve in row["cumulated"].items():
            axes[0][column].plot(PERCENTILES, curve, marker="o", label=f"top {n}")
        axes[0][column].set(title=f"after {row['k']} thought{'s' if row['k'] > 1 else ''}", xlabel="percentile of questions",
                            ylabel="cumulative value")
        for side in ("leads to target", "does not"):
            points = [(h, sides[side][0]) for h, sides in row["height"].items() if sides[side][0] is not None]
            axes[1][column].plot(*zip(*points) if points else ([], []), marker="o", label=side)
        axes[1][column].set(xlabel="height: steps to the nearest leaf", ylabel="mean value", xticks=list(row["height"]))
    for axis in axes[:, 0]:
        axis.legend()
    write_figure(figure, folder)


def write_figure(figure, folder):
    figure.tight_layout()
    for kind in ("png", "svg"):
        figure.savefig(os.path.join(folder, f"thoughts.{kind}"), dpi=150)
        print(f"wrote {os.path.join(folder, f'thoughts.{kind}')}")


def test_items(flags, args):
    items = data_prep.load(flags.data, need=("test",))["test"][:args.n]
    if args.item > len(items):
        raise UserError(f"--item {args.item}: there are {len(items)} test items; choose one of them.")
    return items


def print_thought(i, row):
    print(f"thought {i}  norm {row['norm']:5.2f}  entropy {row['entropy']:4.2f}  " +
          "  ".join(f"{text!r} {100 * q:.0f} %" for text, q in row["top"]))


def save(results, args):
    """Writes probe.json; returns its folder."""
    out = args.out or os.path.dirname(args.checkpoint) or "."
    os.makedirs(out, exist_ok=True)
    data_prep.write_json(os.path.join(out, "probe.json"), results)
    print(f"\nwrote {os.path.join(out, 'probe.json')}")
    return out


@torch.no_grad()
def main(argv=None):
    p = argparse.ArgumentParser(usage="python probe.py CKPT [flags]", description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("checkpoint", metavar="CKPT", help="best.pt or last.pt of a run of coconut.py or codi.py")
    p.add_argument("--data", help="data set (default: the one it was trained on); its test split is used")
    p.add_argument("--n", type=data_prep.at_least(1), default=500, help="test items (default 500)")
    p.add_argument("--item", type=data_prep.at_least(1), default=1, help="test item whose thoughts and tree are shown (default 1)")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    p.add_argument("--out", help="folder for probe.json and figures (default: that of the checkpoint)")
    p.add_argument("--plot", action="store_true", help="also draw figures, if matplotlib is installed")
    args = p.parse_args(argv)
    plt = pyplot() if args.plot else None
    if "n_latent" in runtime.load_checkpoint(args.checkpoint)["flags"]:
        return probe_codi(args, plt)
    changed = dict(device=args.device) | (dict(data=args.data) if args.data else {})
    model, tok, flags, machine = coconut.trained_model(args.checkpoint, changed)
    k_max = flags.stage_max * flags.c
    if flags.method not in coconut.FEEDS_BACK or not k_max:
        raise UserError(f"{args.checkpoint} was trained with --method {flags.method} and has no continuous thoughts to look into; "
                        "give a model of --method coconut.")
    items = test_items(flags, args)
    examples = coconut.tokenize({"test": items}, tok, model, flags)["test"]
    shown = args.item - 1
    results = dict(checkpoint=args.checkpoint, data=flags.data, n=len(items), item=args.item, k=[])
    with machine.autocast():
        print(f"test item {args.item}: {items[shown]['question']}\n")
        results["thoughts"] = decoded_thoughts(model, examples[shown], k_max, tok, machine)
        for i, row in enumerate(results["thoughts"], 1):
            print_thought(i, row)
        if "edges" not in items[0]:
            print("\nThe search tree needs items with a graph (prosqa, prosqa-mini); there is none here.")
        else:
            if not flags.uniform_prob:
                print("\nNote: trained without stage mixing (--uniform-prob 0), so this model was never asked to speak after fewer "
                      "thoughts than its last stage has; what follows says little.")
            graphs = [Graph(item) for item in items]
            for depth in range(flags.stage_max + 1):            # c thoughts stand for one step
                k = depth * flags.c
                outcomes = Counter(classify(text, graph, item["answer"]) for text, graph, item in
                                   zip(spoken(model, examples, k, tok, machine, flags.max_new), graphs, items))
                row = dict(k=k, outcomes={name: outcomes[name] / len(items) for name in OUTCOMES})
                if k:
                    values = node_values(model, items, examples, k, tok, machine)
                    row |= dict(values=values[shown], frontier=frontier_summary(graphs, values, depth),
                                height=height_summary(graphs, values, depth), cumulated=cumulated(values))
                    print(f"\nafter {k} thought{'s' if k > 1 else ''}: value of each node, the probability of its name after 'Every'")
                    print("\n".join(tree_lines(graphs[shown], values[shown])))
                results["k"].append(row)
            report(results)
    out = save(results, args)
    if plt and results["k"]:
        plot(results, out, plt)


def report(results):
    """The tables over all items."""
    percent = lambda share: f"{100 * share:.1f}"
    print(f"\n{results['n']} test items. The frontier after k thoughts (k / c steps): nodes so many steps from the root, where they "
          "are two or more")
    line = "{:>3} {:>6} {:>8} {:>10} {:>11} {:>16} {:>8}".format
    print(line("k", "items", "nodes", "mass, %", "effective", "to the target, %", "chance"))
    for row in results["k"][1:]:
        f = row["frontier"]
        print(line(row["k"], f["n"], f"{f['size']:.2f}", percent(f["mass"]), f"{f['effective']:.2f}", percent(f["right"]),
                   percent(f["chance"])))
    print("\nmean value of frontier nodes by height (steps to the nearest leaf), in %, with their number")
    for row in results["k"][1:]:
        print(f"  k = {row['k']}   " + "   ".join(f"height {h}: " + ", ".join(
            f"{side} {percent(mean)} ({n})" for side, (mean, n) in sides.items() if n) for h, sides in row["height"].items()))
    print(f"\ncumulative value of the best nodes, in %, at percentiles {', '.join(map(str, PERCENTILES))} of the items")
    for row in results["k"][1:]:
        print(f"  k = {row['k']}   " + "   ".join(
            f"top {n}: {' '.join(f'{100 * v:.0f}' for v in curve)}" for n, curve in row["cumulated"].items()))
    print("\nin words after k thoughts, % of the items")
    line = ("{:>3}" + " {:>15}" * len(OUTCOMES)).format
    print(line("k", *OUTCOMES))
    for row in results["k"]:
        print(line(row["k"], *(percent(row["outcomes"][name]) for name in OUTCOMES)))


if __name__ == "__main__":
    runtime.run_main(main, data_prep.DataError)
