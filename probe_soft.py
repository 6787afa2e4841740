"""The experiments of Stochastic Soft Thinking (Wu et al. 2025, arXiv 2508.03440): its comparison of
modes, and probes of what soft thoughts hold.

    js          is a soft token read as if it were its largest part only?
    lens        in which layer does the second candidate's path get lost?
    rouge       how far does each mode leave the greedy thought?
    randomness  how random does noise make a soft token, and how soft does it leave it?
    branching   forks of greedy thoughts: where does the second path lead, and who is right?

Read on in this order: compare_modes, finding, watch, peek, probe_js, then the other probes.
    python soft_thinking.py --probe js
"""

import math

import numpy as np
import torch

from common.sampling import PASS_AT, Draft, compare, js_divergence, mean_and_error, rouge_l
from common.scoring import extract_answer, is_correct
from common.sheets import sheet
from soft_thinking import (MODES, filters, likeliest, prefill, soft_embedding, soft_token, think,
                           think_and_answer)

EMPTY = "(no step is so uncertain: lower --uncertain or raise --temperature)"


# ---------------------------------------------------------------- the five modes

def compare_modes(lab, runs):
    """Accuracy, length and Pass@k of the modes of --mode: a sheet; and the finding, if they are
    all. runs: mode -> its rollouts, as for all functions here."""
    flags = lab.flags
    modes = MODES if flags.mode == "all" else [flags.mode]
    compared = {mode: runs(mode) for mode in modes}
    rows, lines = compare(compared, lab.items, lab.tok, flags.draws), []
    for mode, row in rows.items():
        numbers = [row[name] for name in ("accuracy", "std", "draws", "steps", "ended", "cut")]
        lines.append([mode, *numbers, *row["pass_at"].values()])
    passes = [f"Pass@{k}" for k in PASS_AT if k <= flags.draws]
    shown = sheet("modes", "accuracy in %, mean and standard deviation over draws; "
                  f"{len(lab.items)} test questions, temperature {flags.temperature:g}",
                  ["mode", "accuracy", "±", "draws", "steps", "ended by itself, %", "cut off, %",
                   *passes], lines, 1)
    if flags.mode != "all":
        return shown, ""
    return shown, finding(rows, against_greedy(compared, lab.tok))


def against_greedy(compared, tok):
    """{mode: (questions, draws)} for {mode: rollouts}: ROUGE-L of each trace, its top-1 tokens
    joined, with the greedy one, in words."""
    words = {}
    for mode, found in compared.items():
        words[mode] = [[tok.decode(r.trace).split() for r in mine] for mine in found]
    rouge = {}
    for mode, found in words.items():
        rouge[mode] = np.array([[rouge_l(trace, greedy) for trace in mine]
                                for mine, (greedy,) in zip(found, words["greedy"])])
    return rouge


def finding(rows, rouge):
    """A paragraph from the five modes' numbers: does vanilla follow greedy, does noise escape, at
    what cost or gain? rows: what compare returned; rouge: what against_greedy returned."""
    far = {mode: 1 - x.mean() for mode, x in rouge.items()}
    if not far["sample"]:
        return ("Finding: sampling never left the greedy trace; raise --temperature, or take a "
                "less certain model.")

    def way(mode):
        share = far[mode] / far["sample"]
        word = "stays between"
        if share < 0.25:
            word = "follows greedy"
        elif share > 0.75:
            word = "escapes"
        return f"{mode} goes {100 * share:.0f} % of that way, so it {word},"

    def against(mode, other):                        # paired over the questions
        by_question = rows[mode]["right"].mean(1) - rows[other]["right"].mean(1)
        mean, error = mean_and_error(100 * by_question)
        word = "neither clearly gains nor loses"
        if mean > 2 * error:
            word = "gains"
        elif mean < -2 * error:
            word = "loses"
        return f"{word} against {other} ({mean:+.1f} ± {error:.1f} points)"

    last = max(rows["greedy"]["pass_at"])
    passed = ", ".join(f"{mode} {rows[mode]['pass_at'][last]:.1f} %" for mode in rows)
    return (f"Finding: 1 - ROUGE-L from greedy traces to sampled ones is {far['sample']:.3f}; "
            f"{way('vanilla')} and {against('vanilla', 'greedy')}; {way('gumbel')} and "
            f"{against('gumbel', 'greedy')}, and {against('gumbel', 'sample')}; "
            f"{way('dirichlet')} and {against('dirichlet', 'greedy')}. Right in at least one of "
            f"{last} rollouts: {passed}. (± one standard error over "
            f"{len(rows['greedy']['right'])} questions; to gain or lose takes two.)")


# ---------------------------------------------------------------- looking on

def watch(lab, mode, least=0.0):
    """Think in a mode without noise and look on.

    Yields, before each step is read: the numbers of the batch's questions, the cache, t, the Step,
    and chosen (B,) bool, at least one True: the rows that read it with an entropy of at least
    `least` nats.
    """
    size = max(1, lab.flags.batch_size // 4)     # probes read several variants of each row
    for i in range(0, len(lab.questions), size):
        cache, h = prefill(lab, lab.questions[i:i + size])
        drafts = [Draft(lab) for _ in h]
        for t, step in enumerate(think(lab, cache, h, drafts, mode)):
            chosen = step.live & (step.entropy >= least)
            if chosen.any():
                yield range(i, i + len(h)), cache, t, step, chosen


def candidates(model, h):
    """The two likeliest tokens (B, 2) after states h (B, C), and their embeddings (B, 2, C)."""
    top = model.head(h).topk(2).indices
    return top, model.wte(top)


def peek(lab, runs, cache, inputs, numbers, mode, t):
    """Read each of M inputs (B, M, C) as step t, then the lag - 1 tokens that follow it in this
    mode's rollouts, the same for all M; the cache stays as it was. Returns the states
    (B, M, lag, C) of every layer, the last after ln_f."""
    M, lag = inputs.size(1), lab.flags.lag
    lines = []
    for i in numbers:
        rollout = runs(mode)[i][0]
        line = (rollout.trace + rollout.answer)[t + 1:t + lag]
        lines.append(line + [lab.tok.eos] * (lag - 1 - len(line)))
    following = lab.model.wte(torch.tensor(lines, dtype=torch.long, device=inputs.device))
    x = torch.cat([inputs.flatten(0, 1)[:, None], following.repeat_interleave(M, 0)], 1)
    states = lab.model(embeds=x, cache=cache.repeat(M), all_states=True)
    return [s.unflatten(0, (-1, M)) for s in states]


def as_text(lab, mode):
    """The first question's thought in one line: tokens as they are, mixtures as
    [first 60 % | second 40 %]."""
    cache, h = prefill(lab, lab.questions[:1])
    draft, parts = Draft(lab), []
    for step in think(lab, cache, h, [draft], mode):
        weighed = [(draft.said[-1], 1.0)]
        if step.live[0]:
            weighed = zip(step.indices[0].tolist(), step.weights[0].tolist())
        mixed = [(lab.tok.decode([token]), w) for token, w in weighed if w >= 0.01]
        if len(mixed) == 1:
            parts.append(mixed[0][0])
        else:
            parts.append(f"[{' |'.join(f'{part} {100 * w:.0f} %' for part, w in mixed)}]")
    return "".join(parts[:draft.answer]).replace("\n", " / ")


# ---------------------------------------------------------------- the probes

def probe_js(lab, runs):
    """Is a soft token read as its largest part? JS(P_soft, P_top1) and JS(P_soft, P_top2), where
    P_x is the next-token distribution after x in place of one soft token of a vanilla thought.

    Where language shows a choice only later ("Ann is a cat.\\nEvery cat is a ..") the very next
    token tells nothing. So all three read on, the same tokens, and the largest JS of `lag` places
    is shown next to the first.
    """
    model, least = lab.model, lab.flags.uncertain
    found = [torch.zeros(0, 6)]      # step, entropy, JS next (top-1, top-2), soon (the same)
    for numbers, cache, t, step, chosen in watch(lab, "vanilla"):
        soft = soft_embedding(model.wte.weight, step.indices, step.weights)[:, None]
        inputs = torch.cat([soft, candidates(model, step.h)[1]], 1)            # (B, 3, C)
        states = peek(lab, runs, cache, inputs, numbers, "vanilla", t)
        p = model.head(states[-1]).float().softmax(-1)                         # (B, 3, lag, V)
        js = js_divergence(p[:, :1], p[:, 1:])                                 # (B, 2, lag)
        place = torch.stack([torch.full_like(step.entropy, t + 1), step.entropy], 1)
        found.append(torch.cat([place, js[..., 0], js.amax(-1)], 1)[chosen].cpu())
    found = torch.cat(found).double().numpy()                                  # (N, 6)
    unsure = found[found[:, 1] >= least]
    groups = [(int(t), found[found[:, 0] == t]) for t in np.unique(found[:, 0])]
    groups += [("all", found), ("uncertain", unsure)]
    names = ["next, top-1", "next, top-2", "soon, top-1", "soon, top-2"]
    means = []
    for name, x in groups:
        means.append([name, len(x), *(x[:, 1:].mean(0) if len(x) else [math.nan] * 5)])
    edges = np.linspace(0, math.log(2), 11)
    shares = [100 * np.histogram(x, edges)[0] / max(1, len(x))
              for x in (*found.T[2:], *unsure.T[4:])]
    return [
        sheet("js", "JS divergence in nats (at most ln 2 = 0.693): what follows the soft token, "
              f"against what follows its top-1 or top-2 token alone;\nsoon: most of "
              f"{lab.flags.lag} places; uncertain: from {least:g} nats",
              ["step", "n", "entropy", *names], means),
        sheet("js-histogram", "the same as a histogram, % of the steps",
              ["JS from", *names, *(f"{name}, uncertain" for name in names[2:])],
              [[f"{edge:.2f}", *row] for edge, *row in zip(edges, *shares)], 1)]


WEIGHTS = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.0)


def probe_lens(lab, runs, weights=WEIGHTS):
    """The logit lens on a soft token of two candidates, w e(A) + (1 - w) e(B), at uncertain steps
    of greedy thoughts.

    The two paths are what the model says after A only and after B only, in the first of `lag`
    places where that differs. Each layer's state there, through ln_f and the head, gives their
    probabilities; shown is the first's share.
    """
    model = lab.model
    w, shares, both = torch.tensor(weights, device=lab.machine.device)[:, None], [], []
    for numbers, cache, t, step, chosen in watch(lab, "greedy", lab.flags.uncertain):
        e = candidates(model, step.h)[1]
        inputs = w * e[:, None, 0] + (1 - w) * e[:, None, 1]                   # (B, M, C)
        states = peek(lab, runs, cache, inputs, numbers, "greedy", t)          # (B, M, lag, C)
        said = model.head(states[-1][:, [0, -1]]).argmax(-1)                   # (B, 2, lag)
        differ = said[:, 0] != said[:, 1]
        row = torch.nonzero(chosen & differ.any(1))[:, 0]                      # (N,)
        at = differ[row].int().argmax(1)                                       # (N,) first place
        paths = said[row, :, at][:, None].expand(-1, len(weights), -1)         # (N, M, 2)
        states = [s[row, :, at] for s in states]                               # (N, M, C)
        states[:-1] = map(model.ln_f, states[:-1])
        p = [model.head(s).float().softmax(-1).gather(-1, paths) for s in states]
        p = torch.stack(p, -1)                                                 # (N, M, 2, layers+1)
        shares.append(p[:, :, 0] / p.sum(2))
        both.append(p[..., -1].sum(-1))
    n, lines = sum(map(len, shares)), []
    if n:
        means = torch.cat(shares).mean(0).tolist(), torch.cat(both).mean(0).tolist()
        lines = [[weight, *share, p] for weight, share, p in zip(weights, *means)]
    layers = [f"layer {i + 1}" for i in range(model.config.n_layer)]
    return [sheet("lens", f"logit lens at {n} forks: the first path's share in each layer, the "
                  "input being w of the first candidate and 1 - w of the second",
                  ["w", "embedding", *layers, "probability of both"], lines)]


def probe_rouge(lab, runs):
    """ROUGE-L of each mode's trace with the greedy trace: how far does it go its own way?"""
    lines = []
    for mode, x in against_greedy({mode: runs(mode) for mode in MODES}, lab.tok).items():
        lines.append([mode, *mean_and_error(x.mean(1)), 100 * (x == 1).mean()])
    return [sheet("rouge", "ROUGE-L of the thinking with greedy thinking, its standard error, and "
                  "how many are alike", ["mode", "ROUGE-L", "s. e.", "alike, %"], lines)]


GAMMAS = (0.25, 1, 4, 16, 64, 256)
TAUS = (0.05, 0.25, 0.5, 1, 2, 4)


def probe_randomness(lab, runs, pairs=2000, most=100):
    """Randomness, the JS of two independent soft tokens of one step, against softness, the entropy
    of a soft token, in nats: over sweeps of gamma and tau, at (the first `most`) uncertain steps of
    greedy thoughts."""
    h = [step.h[chosen] for *_, step, chosen in watch(lab, "greedy", lab.flags.uncertain)]
    n, lines = min(most, sum(map(len, h))), []
    sweep = [("vanilla", {}), ("sample", {})]
    sweep += [("dirichlet", dict(gamma=gamma)) for gamma in GAMMAS]
    sweep += [("gumbel", dict(tau=tau)) for tau in TAUS]
    generator = torch.Generator().manual_seed(lab.flags.seed)
    for mode, changed in sweep if n else ():
        logits = lab.model.head(torch.cat(h)[:n]).float().repeat(-(-most // n), 1)
        random, soft = [], []
        for _ in range(-(-pairs // len(logits))):
            drawn = [soft_token(logits, mode, **filters(lab.flags) | changed, generator=generator)
                     for _ in range(2)]
            over_all = [torch.zeros_like(logits).scatter_(1, i, p) for i, p, _ in drawn]
            random.append(js_divergence(*over_all).mean().item())
            soft.append(torch.special.entr(drawn[0][1]).sum(-1).mean().item())
        name = " ".join([mode, *(f"{key} {value:g}" for key, value in changed.items())])
        lines.append([name, np.mean(random), np.mean(soft)])
    return [sheet("randomness", f"randomness and softness, nats, at {n} uncertain steps",
                  ["noise", "randomness", "softness"], lines)]


def probe_branching(lab, runs):
    """Forks of greedy thoughts. At an uncertain step the second candidate, or the soft token, takes
    the first one's place and the thought goes on greedily: is the rest another, is the answer, and
    who is right? The soft token takes the path that it shares up to and including the first
    difference of the two."""
    model, found = lab.model, []
    for numbers, cache, t, step, chosen in watch(lab, "greedy", lab.flags.uncertain):
        if t + 1 == lab.flags.max_think:
            continue
        top, e = candidates(model, step.h)
        p = model.head(step.h).float().softmax(-1).gather(1, top)              # (B, 2)
        indices, weights, _ = soft_token(model.head(step.h), "vanilla", **filters(lab.flags))
        mix = soft_embedding(model.wte.weight, indices, weights)
        inputs = torch.cat([e, mix[:, None]], 1).flatten(0, 1)                 # (3 B, C)
        cache, said = cache.repeat(3), []
        h = model(embeds=inputs[:, None], cache=cache)[:, -1]
        begun = torch.cat([top, likeliest(indices, weights)[:, None]], 1)      # (B, 3)
        for i, three in zip(numbers, begun.tolist()):
            greedy = runs("greedy")[i][0]
            before = (greedy.trace + greedy.answer + [lab.tok.eos] * t)[:t]
            said += [before + [token] for token in three]
        rolls = think_and_answer(lab, cache, h, "greedy", said=said)
        for b in torch.nonzero(chosen)[:, 0].tolist():
            three, wanted = rolls[3 * b:3 * b + 3], lab.items[numbers[b]]["answer"]
            share = 100 * float(p[b, 1] / p[b].sum())
            found.append([t + 1, share, *fork(lab, three, wanted, t + 1)])
    found = np.array(found, float).reshape(len(found), 9)
    groups = [(int(t), found[found[:, 0] == t]) for t in np.unique(found[:, 0])] + [("all", found)]
    lines = [[name, len(x), x[:, 1].mean(), *(100 * x[:, 2:].mean(0))]
             for name, x in groups if len(x)]
    return [sheet("branching", "forks of greedy thoughts, %; the second's part is p2 / (p1 + p2)",
                  ["step", "n", "second's part", "rest differs", "answer differs", "right: first",
                   "right: second", "right: soft", "soft takes first", "soft takes second"],
                  lines, 1)]


def fork(lab, three, wanted, start):
    """Of three Rollouts with the first candidate, the second and the soft token before place
    `start`, seven bools: do rest and answer of the first two differ, is each of the three right,
    does the soft one take the first's path, the second's?"""
    first, second, soft = ((r.trace + r.answer + [lab.tok.eos])[start:] for r in three)
    texts = [lab.tok.decode(r.answer) for r in three]
    n = next((j + 1 for j, (x, y) in enumerate(zip(first, second)) if x != y), None)
    return [n is not None, extract_answer(texts[0]) != extract_answer(texts[1]),
            *(is_correct(said, wanted) for said in texts),
            *(n is not None and soft[:n] == line[:n] for line in (first, second))]


PROBES = {
    "js": probe_js,
    "lens": probe_lens,
    "rouge": probe_rouge,
    "randomness": probe_randomness,
    "branching": probe_branching,
}
