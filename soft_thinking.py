"""Soft Thinking (Zhang et al. 2025, arXiv 2505.15778) and its stochastic form (Wu et al. 2025, arXiv 2508.03440).

A model that reasons in words chooses one token of its next-token distribution p and forgets the rest. Soft
Thinking feeds back all of it, as the mixture of token embeddings that p weighs:

    p = softmax(logits / temperature), filtered          next input = soft token = sum_i p_i e_i

Nothing is trained: it is a way of decoding a model that thinks in words. When the largest part of a soft token is
the end-of-thinking token (here the answer marker ###), or after k confident steps in a row (Cold Stop), thinking
ends and the answer is decoded as usual. The second paper finds that a model reads a mixture as its largest
part alone, so that soft thinking is greedy thinking, and brings the other paths back with noise: p' ~ Dirichlet(gamma p),
or the Gumbel-Softmax, with g ~ Gumbel(0, 1),

    y = softmax((ln p + g) / tau)                        argmax y is a sample of p; tau -> 0 is sampling

It reports gains at 32 billion parameters and none at 7 or fewer: with a small model one sees the mechanism.
Read on in this order: soft_token, think, roll, rollouts, then the probes.
    python soft_thinking.py                                           # trains a small CoT model first
    python soft_thinking.py --model out/prosqa-mini-cot-0/best.pt     # takes that of coconut.py --method cot
"""

import argparse
import functools
import math
import os
from collections import Counter
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

import data_prep
import runtime
from gpt2 import GPT2, GPT2Config, Muon, PRESETS, StaticCache, left_pad
from runtime import UserError

MODES = {                            # name -> what is fed back while thinking
    "greedy": "the likeliest token",
    "sample": "a token drawn from the filtered distribution",
    "vanilla": "the soft token",
    "dirichlet": "a soft token of weights ~ Dirichlet(gamma p)",
    "gumbel": "a soft token of weights softmax((ln p + Gumbel noise) / tau)",
}
SOFT = ("vanilla", "dirichlet", "gumbel")
PROBES = ("js", "lens", "rouge", "randomness", "branching")       # each is a function probe_NAME below
PASS_AT = (1, 2, 4, 8, 16, 32)
TRIES = 6                            # proposals for a gamma draw; all are rejected in fewer than 1 of 10^7 draws

# ---------------------------------------------------------------- flags


def parse_flags(argv=None):
    """Flags; the defaults are the papers', but for the answer's temperature and the sizes of this small setting."""
    p = argparse.ArgumentParser(usage="python soft_thinking.py [flags], --help lists them", description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    count, real, typed = data_prep.at_least, number_between, p.add_argument

    def add(name, default, what, **more):
        p.add_argument(name, default=default, help=f"{what} (default {default})", **more)
    typed("--model", help="a checkpoint (.pt) of coconut.py --method cot or of codi.py, a pytorch_model.bin of GPT-2, or "
          f"one of {', '.join(PRESETS)} (default: a small CoT model trained on --data, kept in --out)")
    typed("--data", help="data set whose test questions are asked (default: the checkpoint's, or prosqa-mini)")
    typed("--mode", choices=("all", "none", *MODES), help="what to feed back while thinking: " + "; ".join(
        f"{name}: {what}" for name, what in MODES.items()) + " (default: all, but none beside --probe)")
    typed("--probe", choices=("all", "none", *PROBES), help="what to look into (default: all, but none beside --mode)")
    add("--temperature", 0.6, "divides the logits while thinking", type=real(1e-6))
    add("--top-k", 30, "most tokens before top-p", type=count(1))
    add("--top-p", 0.95, "keep the fewest tokens that have this probability together", type=real(1e-6, 1))
    add("--min-p", 0.001, "drop tokens less likely than this share of the likeliest", type=real(0, 1))
    typed("--max-topk", type=count(1), help="most tokens in a soft token (default 10; 15 where there is noise)")
    add("--gamma", 4.0, "concentration of Dirichlet noise: the larger, the less noise", type=real(1e-6))
    add("--tau", 0.5, "temperature of the Gumbel-Softmax: towards 0 a soft token becomes one token", type=real(1e-6))
    add("--cold-stop-entropy", 0.01, "Cold Stop: a step is confident below this entropy, in nats", type=real())
    add("--cold-stop-steps", 256, "Cold Stop: so many confident steps in a row end soft thinking", type=count(1))
    add("--max-think", 40, "most steps of thinking; then the answer marker is put in", type=count(1))
    add("--answer-temperature", 0.0, "of the answer's tokens; 0 is greedy: then modes differ by their thinking alone (the "
        "papers: 0.6)", type=lambda x: 0.0 if float(x) == 0 else real(1e-6)(x))
    add("--answer-top-p", 0.95, "top-p of the answer's tokens", type=real(1e-6, 1))
    add("--max-new", 24, "most tokens of an answer", type=count(1))
    add("--n", 200, "test questions", type=count(1))
    add("--draws", 32, "rollouts of each question, where there is chance in the mode", type=count(1))
    add("--batch-size", 256, "rollouts at a time", type=count(1))
    add("--uncertain", 0.1, "probes: a step is uncertain from this entropy on, in nats", type=real())
    add("--lag", 5, "probes: an effect of a soft token is looked for in so many next-token distributions", type=count(1))
    add("--updates", 1200, "without --model: updates of the small model's training", type=count(1))
    add("--seed", 0, "of the noise and of the training", type=count(0))
    add("--device", "auto", "auto, cpu, cuda, cuda:1, mps")
    add("--dtype", "auto", "of matrix products; auto: what is fast here", choices=("auto", "float32", "bfloat16"))
    typed("--compile", action=argparse.BooleanOptionalAction, help="torch.compile the decoding step (default: on a GPU)")
    typed("--out", help="folder of the results, and of the model trained here (default: out/soft-DATA-SEED)")
    typed("--plot", action="store_true", help="also draw the probes' figures, if matplotlib is installed")
    flags = p.parse_args(argv)
    given = flags.mode, flags.probe
    flags.mode = given[0] or ("all" if given[1] in (None, "none") else "none")
    flags.probe = given[1] or ("all" if given[0] in (None, "none") else "none")
    if flags.mode == flags.probe == "none":
        p.error("--mode none --probe none leaves nothing to do: leave out one of them")
    return flags


def number_between(low=0.0, high=1e9):
    """argparse type: a number from `low` to `high`."""
    def number(text):
        if not low <= float(text) <= high:
            raise argparse.ArgumentTypeError(f"{text} is not between {low:g} and {high:g}")
        return float(text)
    return number


# ---------------------------------------------------------------- the method: one soft token


def soft_token(logits, mode, temperature=0.6, top_k=30, top_p=0.95, min_p=0.001, max_topk=None, gamma=4.0, tau=0.5,
               noise=None, generator=None):
    """Logits (B, V) -> what is fed back next, in the papers' order of operations.

    temperature, softmax, entropy; top-k, top-p, min-p, renormalised after each; Dirichlet noise; the max_topk
    largest, renormalised; Gumbel noise. Discrete modes are one token of the same filtered distribution: greedy its
    largest (that of the logits), sample the largest of ln p + g: a draw, and gumbel's limit for tau -> 0.

    noise: as draw_noise gives it for this mode; else it is drawn here, from `generator`.
    Returns indices and weights (B, K), K = min(max_topk, top_k, V), in descending order of p (or p'), weights
    summing to 1 and 0 where filtered; and the entropy (B,) in nats of the whole distribution, before filters.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
    entropy = torch.special.entr(logits.softmax(-1)).sum(-1)
    best, indices = logits.topk(min(top_k, logits.size(-1)))                      # (B, W), descending
    p = best.softmax(-1)
    p = normalised(p * (p.cumsum(-1) - p < top_p))                                # the token that crosses top_p stays
    p = normalised(p * (p >= min_p * p[:, :1]))
    if noise is None and mode not in ("greedy", "vanilla"):
        noise = draw_noise(mode, p.shape, generator).to(p)
    if mode == "dirichlet":
        p, order = log_gamma(gamma * p, noise).softmax(-1).sort(descending=True)
        indices = indices.gather(1, order)
    K = min(max_topk or (10 if mode in ("greedy", "vanilla") else 15), p.size(1))
    p, indices = normalised(p[:, :K]), indices[:, :K]
    if mode == "gumbel":
        p = ((p.log() + noise[:, :K]) / tau).softmax(-1)
    if mode in ("greedy", "sample"):
        chosen = p if mode == "greedy" else p.log() + noise[:, :K]
        p = F.one_hot(chosen.argmax(-1), K).to(p)
    return indices, p, entropy


def normalised(p):
    return p / p.sum(-1, keepdim=True)


def soft_embedding(embeddings, indices, weights):
    """sum_i w_i e_i: embeddings (V, C), indices and weights (B, K) -> (B, C)."""
    return (weights[..., None].to(embeddings.dtype) * embeddings[indices]).sum(-2)


def draw_noise(mode, shape, generator):
    """Noise for weights of `shape` (.., W), float32 on the CPU; it depends on nothing else, so that it can be drawn ahead.

    sample, gumbel: g ~ Gumbel(0, 1), (.., W). dirichlet: exponentials and normals for log_gamma, (.., W, 1 + 2 TRIES).
    """
    def exponential(*shape):
        return torch.empty(shape).exponential_(generator=generator).clamp_(min=1e-30)
    if mode == "dirichlet":
        return torch.cat([exponential(*shape, 1 + TRIES), torch.randn(*shape, TRIES, generator=generator)], -1)
    return -exponential(*shape).log()


def log_gamma(alpha, noise):
    """Logarithms of Gamma(alpha) draws, -inf where alpha is 0; their softmax is a draw of Dirichlet(alpha).

    alpha (.., W), noise of draw_noise. The first proposal that Marsaglia and Tsang (2000) accept is Gamma(alpha + 1)
    distributed, and U^(1 / alpha) times that Gamma(alpha): in logarithms, as small alphas underflow.
    """
    boost, e, x = noise.split([1, TRIES, TRIES], -1)
    d = (alpha + 1 - 1 / 3)[..., None]
    v = (1 + x / (9 * d).sqrt()).clamp(min=1e-9) ** 3                             # what is clamped is not accepted
    first = (-e < x ** 2 / 2 + d - d * v + d * v.log()).int().argmax(-1, keepdim=True)
    return (d * v).gather(-1, first)[..., 0].log() - boost[..., 0] / alpha


def gumbel_log_density(y, p, tau):
    """Log-density of a Gumbel-Softmax sample y (.., K) of weights p (.., K): what a policy gradient needs.

        ln (K - 1)! + (K - 1) ln tau + sum_i [ln p_i - (tau + 1) ln y_i] - K ln sum_i p_i y_i^-tau

    on the simplex, by K - 1 of its coordinates (Maddison et al. 2017, arXiv 1611.00712, definition 1). K counts p_i > 0.
    """
    real = p > 0
    log_p, log_y, K = torch.where(real, p, 1).log(), torch.where(real, y, 1).log(), real.sum(-1)
    total = (log_p - tau * log_y).masked_fill(~real, -torch.inf).logsumexp(-1)
    return torch.lgamma(K.to(y)) + (K - 1) * math.log(tau) + (log_p - (tau + 1) * log_y).sum(-1) - K * total


# ---------------------------------------------------------------- the method: thinking, answering


class Marks(NamedTuple):
    """Token ids that end something. Thinking ends with "###", which may be split otherwise before a number."""
    eos: int
    markers: tuple           # all that "###" can begin with
    usual: int               # what most answers of the data begin with: put in where thinking is cut


class Step(NamedTuple):
    """One step of thinking, before it is read."""
    h: torch.Tensor          # (B, C) the state that predicts it
    indices: torch.Tensor    # (B, K)
    weights: torch.Tensor    # (B, K)
    entropy: torch.Tensor    # (B,)
    top1: torch.Tensor       # (B,) the largest part
    live: torch.Tensor       # (B,) bool: rows that read it; the others have ended
    marker: torch.Tensor     # (B,) what an ended row's answer begins with


class Rollout(NamedTuple):
    trace: list              # top-1 tokens of the thinking
    answer: list             # token ids from the marker on, without eos
    ended: bool              # by its own marker, not by Cold Stop, max_think or eos


def settings(flags):
    """What soft_token takes from the flags."""
    return {k: getattr(flags, k) for k in ("temperature", "top_k", "top_p", "min_p", "max_topk", "gamma", "tau")}


def think(model, cache, h, mode, flags, marks, noise=None, start=0):
    """The loop of soft thinking, from the state h (B, C) at the end of what `cache` holds; yields each Step.

        state h  ->  logits  ->  soft token  ->  sum_i w_i e_i  ->  next state h      (one position, the cache grows)

    Rows that have ended go on with keep=False: their columns are padding. noise (max_think, B, W, ..): of all
    steps. start: how many of the max_think steps were made before.
    """
    live, confident = torch.ones_like(h[:, 0], dtype=torch.bool), torch.zeros_like(h[:, 0], dtype=torch.long)
    marker, markers = torch.full_like(confident, marks.usual), torch.tensor(marks.markers, device=h.device)
    for t in range(start, flags.max_think):
        given = None if noise is None else noise[t]
        indices, weights, entropy = soft_token(model.head(h), mode, **settings(flags), noise=given)
        top1 = indices.gather(1, weights.argmax(1, keepdim=True))[:, 0]                       # (B,)
        spoken = torch.isin(top1, markers)
        marker = torch.where(live & spoken, top1, marker)
        live = live & ~spoken & (top1 != marks.eos)
        if mode in SOFT:                             # Cold Stop: the marker stands in the k-th step's place
            confident = torch.where(entropy < flags.cold_stop_entropy, confident + 1, 0)
            live = live & (confident < flags.cold_stop_steps)
        yield Step(h, indices, weights, entropy, top1, live, marker)
        if not live.any():
            break
        x = soft_embedding(model.wte.weight, indices, weights)[:, None]                       # (B, 1, C)
        h = (model.step or model)(embeds=x, cache=cache, keep=live[:, None])[:, -1]


def roll(model, cache, h, mode, flags, marks, noise=None, answer_noise=None, start=0):
    """Think, then decode the answer token by token: a Rollout for each row of h (B, C).

    Every row answers: where thinking did not end by itself the marker is put in. Mode greedy answers greedily, too.
    """
    steps = list(think(model, cache, h, mode, flags, marks, noise, start))
    token = steps[-1].marker
    rows, done = [token], torch.zeros_like(token, dtype=torch.bool)
    greedy = mode == "greedy" or not flags.answer_temperature
    for t in range(flags.max_new - 1):
        h = (model.step or model)(embeds=model.wte(token)[:, None], cache=cache, keep=~done[:, None])[:, -1]
        indices, weights, _ = soft_token(
            model.head(h), "greedy" if greedy else "sample", flags.answer_temperature or 1.0, flags.top_k,
            flags.answer_top_p, 0.0, flags.top_k, noise=None if greedy else answer_noise[t])
        token = indices.gather(1, weights.argmax(1, keepdim=True))[:, 0]
        done = done | (token == marks.eos)
        rows.append(torch.where(done, marks.eos, token))
        if done.all():
            break
    answers = [row[:row.index(marks.eos)] if marks.eos in row else row for row in torch.stack(rows, 1).tolist()]
    top1, n = torch.stack([s.top1 for s in steps], 1).tolist(), torch.stack([s.live for s in steps]).sum(0).tolist()
    return [Rollout(row[:k], answer, row[k:k + 1] == answer[:1]) for row, k, answer in zip(top1, n, answers)]


def prefill(model, questions, flags, marks, machine):
    """Read questions (token-id lists) as one left-padded batch: a StaticCache and the states (B, C) at their ends. All
    caches have flags.columns, room for the longest rollout, so that a compiled step is compiled once."""
    ids, keep = left_pad(questions, marks.eos, machine.device)
    cache = StaticCache(model.config, len(questions), flags.columns, machine.device, machine.dtype)
    return cache, model(ids, cache=cache, keep=keep, last=1)[:, -1]


def rollouts(model, questions, mode, flags, marks, machine):
    """Each question flags.draws times, once where nothing is drawn: a list of lists of Rollouts.

    Rollouts of one question share one prefill. The noise of each is a function of seed, question and draw, not of
    its batch, and the same for sample and gumbel: the token one draws leads the other's mixture, while they agree.
    """
    certain = mode == "greedy" or (mode == "vanilla" and not flags.answer_temperature)
    R, W, found = 1 if certain else flags.draws, min(flags.top_k, model.config.vocab_size), [None] * len(questions)
    by_length = np.array(sorted(range(len(questions)), key=lambda i: len(questions[i])))
    for chunk in np.array_split(by_length, -(-len(questions) // max(1, flags.batch_size // R))):
        cache, h = prefill(model, [questions[i] for i in chunk], flags, marks, machine)
        noise = None, None
        if not certain:
            rows = [torch.Generator().manual_seed(int(runtime.generator(flags.seed, i, d).integers(2 ** 62)))
                    for i in chunk for d in range(R)]
            noise = [torch.stack([draw_noise(kind, (T, W), row) for row in rows], 1).to(h.device)     # (T, B R, W, ..)
                     for kind, T in ((mode, flags.max_think), ("sample", flags.max_new))]
        done = roll(model, cache.repeat(R), h.repeat_interleave(R, 0), mode, flags, marks, *noise)
        for j, i in enumerate(chunk):
            found[i] = done[j * R:(j + 1) * R]
    return found


# ---------------------------------------------------------------- the five modes


def pass_at(k, n, right):
    """Chance that one of k rollouts is right, estimated without bias from n of which some are:
    1 - C(n - right, k) / C(n, k) (Chen et al. 2021, arXiv 2107.03374, equation 1)."""
    return 1 - math.comb(n - right, k) / math.comb(n, k)


def rouge_l(a, b):
    """ROUGE-L of two lists of words: F1 of their longest common subsequence (Lin 2004); 1 for two empty ones."""
    row = [0] * (len(b) + 1)
    for word in a:
        above, row = row, [0]
        for j, other in enumerate(b):
            row.append(above[j] + 1 if word == other else max(row[j], above[j + 1]))
    return 2 * row[-1] / (len(a) + len(b)) if a or b else 1.0


def compare(runs, items, tok, draws):
    """{mode: dict} for runs {mode: rollouts}: accuracy (mean over draws, %), std (over draws), draws, steps (mean
    length of the thinking), ended (by itself, %), pass_at {k: %}, right (questions, draws) 0 or 1."""
    rows = {}
    for mode, found in runs.items():
        right = np.array([[data_prep.is_correct(tok.decode(r.answer), item["answer"]) for r in row]
                          for row, item in zip(found, items)], float)
        R, by_draw, flat = right.shape[1], 100 * right.mean(0), [r for row in found for r in row]
        rows[mode] = dict(
            accuracy=by_draw.mean(), std=by_draw.std(ddof=1) if R > 1 else 0.0, draws=R, right=right,
            steps=np.mean([len(r.trace) for r in flat]), ended=100 * np.mean([r.ended for r in flat]),
            pass_at={k: 100 * np.mean([pass_at(min(k, R), R, int(c)) for c in right.sum(1)])
                     for k in PASS_AT if k <= draws})
    return rows


def against_greedy(runs, tok):
    """{mode: (questions, draws)}: ROUGE-L of each trace, its top-1 tokens joined, with the greedy one, in words."""
    words = {mode: [[tok.decode(r.trace).split() for r in row] for row in found] for mode, found in runs.items()}
    return {mode: np.array([[rouge_l(trace, greedy) for trace in row] for row, (greedy,) in zip(found, words["greedy"])])
            for mode, found in words.items()}


def mean_and_error(x):
    """Mean over the questions, and its standard error."""
    return float(np.mean(x)), float(np.std(x, ddof=1) / len(x) ** 0.5) if len(x) > 1 else 0.0


def finding(rows, rouge):
    """A paragraph from the five modes' numbers: does vanilla follow greedy, does noise escape, at what cost or gain?"""
    far = {mode: 1 - x.mean() for mode, x in rouge.items()}
    if not far["sample"]:
        return "Finding: sampling never left the greedy trace; raise --temperature, or take a less certain model."

    def way(mode):
        share = far[mode] / far["sample"]
        word = "follows greedy" if share < 0.25 else "escapes" if share > 0.75 else "stays between"
        return f"{mode} goes {100 * share:.0f} % of that way, so it {word},"

    def against(mode, other):                        # paired over the questions
        mean, error = mean_and_error(100 * (rows[mode]["right"].mean(1) - rows[other]["right"].mean(1)))
        word = "gains" if mean > 2 * error else "loses" if mean < -2 * error else "neither clearly gains nor loses"
        return f"{word} against {other} ({mean:+.1f} ± {error:.1f} points)"
    last = max(rows["greedy"]["pass_at"])
    return (f"Finding: 1 - ROUGE-L from greedy traces to sampled ones is {far['sample']:.3f}; {way('vanilla')} and "
            f"{against('vanilla', 'greedy')}; {way('gumbel')} and {against('gumbel', 'greedy')}, and "
            f"{against('gumbel', 'sample')}; {way('dirichlet')} and {against('dirichlet', 'greedy')}. Right in at "
            f"least one of {last} rollouts: " + ", ".join(f"{mode} {rows[mode]['pass_at'][last]:.1f} %" for mode in rows) +
            f". (± one standard error over {len(rows['greedy']['right'])} questions; to gain or lose takes two.)")


# ---------------------------------------------------------------- the probes of 2508.03440


class Lab(NamedTuple):
    """What every probe is given."""
    model: GPT2
    questions: list          # token ids
    items: list
    runs: Any                # mode -> its rollouts
    tok: data_prep.Tokenizer
    flags: argparse.Namespace
    marks: Marks
    machine: runtime.Machine


def watch(lab, mode, least=0.0):
    """Think in a mode without noise and look on. Before each step is read: the numbers of the batch's questions, the
    cache, t, the Step, and rows (B,) bool, at least one: those that read it with an entropy of at least `least` nats."""
    size = max(1, lab.flags.batch_size // 4)                     # probes read several variants of each row
    for i in range(0, len(lab.questions), size):
        cache, h = prefill(lab.model, lab.questions[i:i + size], lab.flags, lab.marks, lab.machine)
        for t, step in enumerate(think(lab.model, cache, h, mode, lab.flags, lab.marks)):
            rows = step.live & (step.entropy >= least)
            if rows.any():
                yield range(i, i + len(h)), cache, t, step, rows


def candidates(model, h):
    """The two likeliest tokens (B, 2) after states h (B, C), and their embeddings (B, 2, C)."""
    top = model.head(h).topk(2).indices
    return top, model.wte(top)


def peek(lab, cache, inputs, numbers, mode, t):
    """Read each of M inputs (B, M, C) as step t, then the lag - 1 tokens that follow it in this mode's rollouts, the
    same for all M; the cache stays as it was. Returns the states (B, M, lag, C) of every layer, the last after ln_f."""
    M, lag = inputs.size(1), lab.flags.lag
    lines = [(r.trace + r.answer)[t + 1:t + lag] for r in (lab.runs(mode)[i][0] for i in numbers)]
    lines = [line + [lab.marks.eos] * (lag - 1 - len(line)) for line in lines]
    following = lab.model.wte(torch.tensor(lines, dtype=torch.long, device=inputs.device))
    x = torch.cat([inputs.flatten(0, 1)[:, None], following.repeat_interleave(M, 0)], 1)
    return [s.unflatten(0, (-1, M)) for s in lab.model(embeds=x, cache=cache.repeat(M), all_states=True)]


def js_divergence(p, q):
    """Jensen-Shannon divergence of distributions (.., V), in nats: H((p + q) / 2) - (H(p) + H(q)) / 2, from 0 to ln 2."""
    H = lambda p: torch.special.entr(p).sum(-1)
    return (H((p + q) / 2) - (H(p) + H(q)) / 2).clamp(0, math.log(2))


def probe_js(lab):
    """Is a soft token read as its largest part? JS(P_soft, P_top1) and JS(P_soft, P_top2): P_x is the next-token
    distribution after x in place of one soft token of a vanilla thought.

    Where language says a choice again only later ("Ann is a cat.\nEvery cat is a ..") the very next token tells
    nothing. So all three read on, the same tokens, and the largest JS in `lag` places stands beside the first.
    """
    found, least = [torch.zeros(0, 6)], lab.flags.uncertain      # step, entropy, JS next (top-1, top-2), soon (the same)
    for numbers, cache, t, step, rows in watch(lab, "vanilla"):
        soft = soft_embedding(lab.model.wte.weight, step.indices, step.weights)[:, None]
        states = peek(lab, cache, torch.cat([soft, candidates(lab.model, step.h)[1]], 1), numbers, "vanilla", t)
        p = lab.model.head(states[-1]).float().softmax(-1)                                    # (B, 3, lag, V)
        js = js_divergence(p[:, :1], p[:, 1:])                                                # (B, 2, lag)
        place = torch.stack([torch.full_like(step.entropy, t + 1), step.entropy], 1)
        found.append(torch.cat([place, js[..., 0], js.amax(-1)], 1)[rows].cpu())
    found, edges = torch.cat(found).double().numpy(), np.linspace(0, math.log(2), 11)
    unsure, names = found[found[:, 1] >= least], ["next, top-1", "next, top-2", "soon, top-1", "soon, top-2"]
    groups = [(int(t), found[found[:, 0] == t]) for t in np.unique(found[:, 0])] + [("all", found), ("uncertain", unsure)]
    shares = [100 * np.histogram(x, edges)[0] / max(1, len(x)) for x in (*found.T[2:], *unsure.T[4:])]
    return [table("js", "JS divergence in nats (at most ln 2 = 0.693): what follows the soft token, against what follows "
                  f"its top-1 or top-2 token alone;\nsoon: most of {lab.flags.lag} places; uncertain: from {least:g} nats",
                  ["step", "n", "entropy", *names],
                  [[name, len(x), *(x[:, 1:].mean(0) if len(x) else [math.nan] * 5)] for name, x in groups]),
            table("js-histogram", "the same as a histogram, % of the steps",
                  ["JS from", *names, *(f"{name}, uncertain" for name in names[2:])],
                  [[f"{edge:.2f}", *row] for edge, *row in zip(edges, *shares)], 1)]


def probe_lens(lab, weights=(1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.0)):
    """The logit lens on a soft token of two candidates, w e(A) + (1 - w) e(B), at uncertain steps of greedy thoughts.

    The two paths are what the model says after A alone and after B alone, in the first of `lag` places where that
    differs. Each layer's state there, through ln_f and the head, gives their probabilities; shown is the first's share.
    """
    w, shares, both = torch.tensor(weights, device=lab.machine.device)[:, None], [], []
    for numbers, cache, t, step, rows in watch(lab, "greedy", lab.flags.uncertain):
        e = candidates(lab.model, step.h)[1]
        states = peek(lab, cache, w * e[:, None, 0] + (1 - w) * e[:, None, 1], numbers, "greedy", t)     # (B, M, lag, C)
        said = lab.model.head(states[-1][:, [0, -1]]).argmax(-1)                              # (B, 2, lag)
        differ = said[:, 0] != said[:, 1]
        row = torch.nonzero(rows & differ.any(1))[:, 0]
        at = differ[row].int().argmax(1)                                                      # (N,) the first place
        paths = said[row, :, at][:, None].expand(-1, len(weights), -1)                        # (N, M, 2)
        states = [s[row, :, at] for s in states]                                              # (N, M, C)
        states[:-1] = map(lab.model.ln_f, states[:-1])
        p = torch.stack([lab.model.head(s).float().softmax(-1).gather(-1, paths) for s in states], -1)
        shares.append(p[:, :, 0] / p.sum(2))                                                  # (N, M, layers + 1)
        both.append(p[..., -1].sum(-1))
    n = sum(map(len, shares))
    means = zip(weights, torch.cat(shares).mean(0).tolist(), torch.cat(both).mean(0).tolist()) if n else ()
    layers = [f"layer {i + 1}" for i in range(lab.model.config.n_layer)]
    return [table("lens", f"logit lens at {n} forks: the first path's share in each layer, the input being w of the first "
                  "candidate and 1 - w of the second", ["w", "embedding", *layers, "probability of both"],
                  [[weight, *share, p] for weight, share, p in means])]


def probe_rouge(lab):
    """ROUGE-L of each mode's trace with the greedy trace: how far does it go its own way?"""
    found = against_greedy({mode: lab.runs(mode) for mode in MODES}, lab.tok)
    return [table("rouge", "ROUGE-L of the thinking with greedy thinking, its standard error, and how many are alike",
                  ["mode", "ROUGE-L", "s. e.", "alike, %"],
                  [[mode, *mean_and_error(x.mean(1)), 100 * (x == 1).mean()] for mode, x in found.items()])]


def probe_randomness(lab, pairs=2000, most=100, gammas=(0.25, 1, 4, 16, 64, 256), taus=(0.05, 0.25, 0.5, 1, 2, 4)):
    """Randomness, the JS of two independent soft tokens of one step, against softness, the entropy of a soft token, in
    nats: over sweeps of gamma and tau, at (the first `most`) uncertain steps of greedy thoughts."""
    h = [step.h[rows] for *_, step, rows in watch(lab, "greedy", lab.flags.uncertain)]
    n = min(most, sum(map(len, h)))
    logits = lab.model.head(torch.cat(h)[:n]).float().repeat(-(-most // n), 1) if h else []
    sweep = [("vanilla", {}), ("sample", {}), *(("dirichlet", dict(gamma=g)) for g in gammas),
             *(("gumbel", dict(tau=t)) for t in taus)]
    lines, generator = [], torch.Generator().manual_seed(lab.flags.seed)
    for mode, changed in sweep if h else ():
        random, soft = [], []
        for _ in range(-(-pairs // len(logits))):
            drawn = [soft_token(logits, mode, **settings(lab.flags) | changed, generator=generator) for _ in range(2)]
            random.append(js_divergence(*(torch.zeros_like(logits).scatter_(1, i, p) for i, p, _ in drawn)).mean().item())
            soft.append(torch.special.entr(drawn[0][1]).sum(-1).mean().item())
        lines.append([" ".join([mode, *(f"{k} {v:g}" for k, v in changed.items())]), np.mean(random), np.mean(soft)])
    return [table("randomness", f"randomness and softness, nats, at {n} uncertain steps",
                  ["noise", "randomness", "softness"], lines)]


def probe_branching(lab):
    """Forks of greedy thoughts. At an uncertain step the second candidate, or the soft token, takes the first one's place
    and the thought goes on greedily: is the rest another, is the answer, and who is right? The soft token takes the path
    that it shares up to their first difference, that included."""
    found, model = [], lab.model
    for numbers, cache, t, step, rows in watch(lab, "greedy", lab.flags.uncertain):
        if t + 1 == lab.flags.max_think:
            continue
        top, e = candidates(model, step.h)
        p = model.head(step.h).float().softmax(-1).gather(1, top)
        mix = soft_embedding(model.wte.weight, *soft_token(model.head(step.h), "vanilla", **settings(lab.flags))[:2])
        cache = cache.repeat(3)
        h = model(embeds=torch.cat([e, mix[:, None]], 1).flatten(0, 1)[:, None], cache=cache)[:, -1]          # (3 B, C)
        rolls = roll(model, cache, h, "greedy", lab.flags, lab.marks, start=t + 1)
        for b in torch.nonzero(rows)[:, 0].tolist():
            three, right = rolls[3 * b:3 * b + 3], lab.items[numbers[b]]["answer"]
            first, second, soft = (r.trace + r.answer + [lab.marks.eos] for r in three)
            texts = [lab.tok.decode(r.answer) for r in three]
            fork = next((j + 1 for j, (x, y) in enumerate(zip(first, second)) if x != y), None)
            found.append([t + 1, 100 * float(p[b, 1] / p[b].sum()), fork is not None,
                          data_prep.extract_answer(texts[0]) != data_prep.extract_answer(texts[1]),
                          *(data_prep.is_correct(text, right) for text in texts),
                          *(fork is not None and soft[:fork] == line[:fork] for line in (first, second))])
    found = np.array(found, float).reshape(len(found), 9)
    groups = [(int(t), found[found[:, 0] == t]) for t in np.unique(found[:, 0])] + [("all", found)]
    return [table("branching", "forks of greedy thoughts, %; the second's part is p2 / (p1 + p2)", [
        "step", "n", "second's part", "rest differs", "answer differs", "right: first", "right: second", "right: soft",
        "soft takes first", "soft takes second"],
        [[name, len(x), x[:, 1].mean(), *(100 * x[:, 2:].mean(0))] for name, x in groups if len(x)], 1)]


# ---------------------------------------------------------------- tables and figures


def table(name, title, columns, rows, decimals=3):
    """What is shown, written as NAME.json and drawn as NAME.png; a number that is not defined becomes None."""
    plain = lambda x: x if isinstance(x, (str, int)) else None if math.isnan(x) else float(x)
    return dict(name=name, title=title, columns=columns, rows=[[plain(x) for x in row] for row in rows], decimals=decimals)


def show(t):
    text = lambda x: "" if x is None else f"{x:.{t['decimals']}f}" if isinstance(x, float) else str(x)
    cells = zip(t["columns"], *(map(text, row) for row in t["rows"]))
    columns = [[f"{x:{'>' if j else '<'}{max(map(len, column))}}" for x in column] for j, column in enumerate(cells)]
    print("", t["title"], *map("  ".join, zip(*columns)), sep="\n")
    if not t["rows"]:
        print("(no step is so uncertain: lower --uncertain or raise --temperature)")


def pyplot():
    """matplotlib's, if it is installed: the project does not need it."""
    try:
        import matplotlib
        matplotlib.use("Agg")
        import matplotlib.pyplot
    except ImportError:
        raise UserError("--plot needs matplotlib, which is not installed: pip install matplotlib, or leave "
                        "--plot out.") from None
    return matplotlib.pyplot


def plot(t, folder, plt):
    """NAME.png: randomness over softness as points; of any other table the columns as lines over the first."""
    figure, axis = plt.subplots(figsize=(8, 5))
    points, columns = t["name"] == "randomness", list(zip(*t["rows"])) or [[]] * len(t["columns"])
    for name, random, soft in t["rows"] if points else ():
        axis.plot([soft], [random], marker="o", label=name)
    for name, column in () if points else zip(t["columns"][1:], columns[1:]):
        if name not in ("n", "s. e."):
            axis.plot([str(x) for x in columns[0]], column, marker="o", label=name)
    axis.set(title=t["title"].split("\n")[0], xlabel=t["columns"][2 if points else 0], ylabel="randomness" if points else "")
    axis.legend()
    figure.savefig(os.path.join(folder, f"{t['name']}.png"), dpi=150)


def as_text(lab, mode):
    """The first question's thought in one line: tokens as they are, mixtures as [first 60 % | second 40 %]."""
    parts = []
    for *_, step, _ in watch(lab._replace(questions=lab.questions[:1]), mode):
        mixed = [(lab.tok.decode([i]), w) for i, w in zip(step.indices[0].tolist(), step.weights[0].tolist()) if w >= 0.01]
        parts.append(mixed[0][0] if len(mixed) == 1 else f"[{' |'.join(f'{text} {100 * w:.0f} %' for text, w in mixed)}]")
    return "".join(parts).replace("\n", " / ")


# ---------------------------------------------------------------- the model


def train_small(data, name, flags, machine, path):
    """Where no model is given: coconut.py --method cot in one stage, with its recipe for prosqa-mini but 20 updates of
    warm-up, and its checkpoint."""
    tok = data_prep.compact_tokenizer(data["train"], "### ", "is-a")
    rows = [(e.question[:-1], 0, e.question[-1:] + sum(e.steps, []) + e.answer)      # given; no thoughts; to be predicted
            for e in data_prep.tokenize(data["train"], tok, 10 ** 9, 0, name)]
    lengths, size = [(len(p), len(l)) for p, _, l in rows], dict(block_size=256, n_layer=2, n_head=4, n_embd=128)
    if max(map(sum, lengths)) > size["block_size"]:
        raise UserError(f"--data {name}: an item takes {max(map(sum, lengths))} positions, the model trained here has "
                        f"{size['block_size']}; train one with coconut.py --method cot and give it as --model.")
    torch.manual_seed(flags.seed)
    model = GPT2(GPT2Config(vocab_size=tok.n_vocab, embd_std=0.1, state_std=0.1, **size)).to(machine.device)
    decayed, rest = model.param_groups(weight_decay=0.1)
    optimizers = [Muon([decayed], 2e-3), torch.optim.AdamW([rest], 2e-3, betas=(0.9, 0.95), fused=True)]
    per_epoch = -(-len(rows) // 32)
    with runtime.progress_bar(flags.updates) as bar:
        for update in range(flags.updates):
            epoch, k = divmod(update, per_epoch)
            if k == 0:
                order = data_prep.batches(lengths, 32, runtime.generator(flags.seed, 0, epoch))
            batch = data_prep.collate([rows[i] for i in order[k]], tok.eos, machine.device)
            ids, T = torch.cat([batch.prompt, batch.language], 1), batch.language.size(1)
            keep = torch.cat([batch.keep, torch.ones_like(batch.language, dtype=torch.bool)], 1)
            with machine.autocast():
                h = model(ids, keep=keep, last=T)                                             # (B, T, C)
                loss = F.cross_entropy(model.head(h.flatten(0, 1)[batch.where]).float(), batch.labels)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer in optimizers:
                optimizer.param_groups[0]["lr"] = runtime.learning_rate(update, flags.updates, 2e-3, warmup=20, decay=0.2)
                optimizer.step()
            model.zero_grad(set_to_none=True)
            bar.update()
            bar.set_postfix_str(f"loss {loss.item():.3f}", refresh=False)
    trained = dict(size, method="cot", stage_max=0, steps_last=flags.updates, epochs_last=None, data=name, seed=flags.seed,
                   dtype=str(machine.dtype).removeprefix("torch."))
    state = dict(config=vars(model.config), model=model.state_dict(), tokenizer=tok.state(), flags=trained)
    runtime.save_checkpoint(path, state)


def released(name):
    """Model and tokenizer of released GPT-2 weights: a name in PRESETS or a file."""
    try:
        model = GPT2.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise UserError(f"--model {name}: no weights to be had there ({runtime.first_line(error)}); give the path of a "
                        "checkpoint (.pt) or of a GPT-2 pytorch_model.bin that is at hand.") from None
    tok = data_prep.Tokenizer.gpt2()
    if model.config.vocab_size != tok.eos + 1:
        raise UserError(f"--model {name}: has {model.config.vocab_size:,} token embeddings, but GPT-2's tokenizer "
                        f"{tok.eos + 1:,}; give weights of a GPT-2.")
    return model, tok


def folder(flags, data):
    return flags.out or os.path.join("out", f"soft-{os.path.basename(os.path.normpath(data))}-{flags.seed}")


def from_checkpoint(flags):
    """Model, tokenizer, data, answer marker of --model CKPT, or of the small model in --out, trained now if it is not there."""
    data = flags.data or "prosqa-mini"
    path = flags.model or os.path.join(folder(flags, data), "cot.pt")
    if not flags.model and not os.path.exists(path):
        items = data_prep.load(data, need=("train", "test"))
        print(f"no --model: training a small one on {data} to think in words, {flags.updates:,} updates, kept as {path}")
        os.makedirs(folder(flags, data), exist_ok=True)
        train_small(items, data, flags, runtime.Machine(flags.device, flags.dtype, 128), path)
    state = runtime.load_checkpoint(path)
    trained, own = state["flags"], dict(data=data, seed=flags.seed, steps_last=flags.updates)
    if not flags.model and {k: trained.get(k) for k in own} != own:
        raise UserError(f"{path} was trained with other --data, --seed or --updates; choose another --out, or give it "
                        "as --model.")
    if trained.get("method") not in ("cot", "codi"):
        raise UserError(f"{path} was trained with --method {trained.get('method')} and does not think in words; give one of "
                        "coconut.py --method cot.")
    model = GPT2(GPT2Config(**state["config"] | dict(dropout=0.0)))
    model.load_state_dict(state["model"])
    tok = data_prep.Tokenizer.from_state(state["tokenizer"])
    return model, tok, flags.data or trained.get("data", data), trained.get("prompt", "### ")


# ---------------------------------------------------------------- main


def run(flags):
    plt = pyplot() if flags.plot else None
    if flags.model and not flags.model.endswith(".pt"):
        (model, tok), flags.data, prompt = released(flags.model), flags.data or "prosqa-mini", "### "
    else:
        model, tok, flags.data, prompt = from_checkpoint(flags)
    items = data_prep.load(flags.data, need=("test",))["test"][:flags.n]
    machine = runtime.Machine(flags.device, flags.dtype, model.config.n_embd)
    model.to(machine.device).eval()
    if flags.compile or (flags.compile is None and machine.device.type == "cuda"):
        model.step = torch.compile(model.forward)
    examples = data_prep.tokenize(items, tok, 10 ** 9, 0, f"{flags.data}, test.json", prompt)
    questions, first = [e.question for e in examples], Counter(e.answer[0] for e in examples)
    marks = Marks(tok.eos, tuple({tok.encode(prompt + kind)[0] for kind in ("word", "7")}), first.most_common(1)[0][0])
    flags.columns = max(map(len, questions)) + flags.max_think + max(flags.max_new, flags.lag)
    if flags.columns > model.config.block_size:
        raise UserError(f"the longest question, --max-think {flags.max_think} and --max-new {flags.max_new} take "
                        f"{flags.columns} positions, the model has {model.config.block_size}; lower one of the two.")
    flags.out = folder(flags, flags.data)
    os.makedirs(flags.out, exist_ok=True)
    print(f"{machine}; {model.n_params() / 1e6:.2f} M parameters; {len(items)} test questions of {flags.data}")
    runs = functools.cache(lambda mode: rollouts(model, questions, mode, flags, marks, machine))
    lab, tables, text = Lab(model, questions, items, runs, tok, flags, marks, machine), [], ""
    with torch.no_grad(), machine.autocast():
        print(f"\ntest question 1: {items[0]['question']}\nvanilla thinks: {as_text(lab, 'vanilla')}")
        if flags.mode != "none":
            compared = {mode: runs(mode) for mode in (MODES if flags.mode == "all" else (flags.mode,))}
            rows = compare(compared, items, tok, flags.draws)
            tables.append(table(
                "modes", f"accuracy in %, mean and standard deviation over draws; {len(items)} test questions, temperature "
                f"{flags.temperature:g}", ["mode", "accuracy", "±", "draws", "steps", "ended by itself, %",
                                           *(f"Pass@{k}" for k in PASS_AT if k <= flags.draws)],
                [[mode, *(r[x] for x in ("accuracy", "std", "draws", "steps", "ended")), *r["pass_at"].values()]
                 for mode, r in rows.items()], 1))
            show(tables[-1])
            text = finding(rows, against_greedy(compared, tok)) if flags.mode == "all" else ""
        for probe in PROBES if flags.probe == "all" else () if flags.probe == "none" else (flags.probe,):
            for t in globals()[f"probe_{probe}"](lab):
                tables.append(t)
                show(t)
    print(f"\n{text}" if text else "")
    data_prep.write_jsons({os.path.join(flags.out, f"{t['name']}.json"):
                           t | dict(finding=text, n=len(items), flags=vars(flags)) for t in tables})
    for t in tables[flags.mode != "none":] if plt else ():
        plot(t, flags.out, plt)
    print(f"wrote {', '.join(t['name'] for t in tables)} ({'.json and .png' if plt else '.json'}) to {flags.out}")
    return 0


def main(argv=None):
    try:
        return run(parse_flags(argv))
    except KeyboardInterrupt:
        print("\nstopped; nothing was written but a trained model")
        return 130


if __name__ == "__main__":
    runtime.run_main(main, data_prep.DataError)
