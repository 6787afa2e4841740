"""The experiments of Stochastic Soft Thinking (Wu et al. 2025, arXiv 2508.03440): its comparison of
modes, and probes of what soft thoughts hold.

    js          is a soft token read as if it were its largest part only?
    lens        in which layer does the second candidate's path get lost?
    rouge       how far does each mode leave the greedy thought?
    randomness  how random does noise make a soft token, and how soft does it leave it?
    branching   forks of greedy thoughts: where does the second path lead, and who is right?

Each gives sheets: a table, perhaps a figure, and what its numbers say about the paper's claims.
Read on in this order: compare_modes, watch, peek, probe_js, then the other probes.
    python soft_thinking.py --probe js
"""

import functools
import itertools

import numpy as np
import torch

from common import claims, probe_sheets
from common.sampling import (PASS_AT, against_greedy, compare, js_divergence, likeliest,
                             soft_embedding)
from common.scoring import same_answer
from common.sheets import sheet
from soft_thinking import (MODES, Step, filters, prefill, rollouts, soft_token, think,
                           think_and_answer)

EMPTY = "(no step is so uncertain: lower --uncertain or raise --temperature)"


class Runs:
    """What several probes look at, made once: runs(mode) are its rollouts."""

    def __init__(self, lab):
        self.lab, self.made = lab, {}

    def __call__(self, mode):
        if mode not in self.made:
            self.made[mode] = rollouts(self.lab, mode)
        return self.made[mode]

    @functools.cached_property
    def forks(self):
        """Uncertain steps of greedy thoughts: questions [N], steps [N], and states (N, C)."""
        questions, steps, states = [], [], [self.lab.model.wte.weight[:0]]
        for numbers, _, _, t, step in watch(self.lab, "greedy", self.lab.flags.uncertain):
            questions += numbers
            steps += [t] * len(numbers)
            states.append(step.h)
        return questions, steps, torch.cat(states)

    def some_forks(self, size, room=0):
        """At most --forks of them, drawn at random, that leave `room` for more thinking, read again
        in batches, early ones first: yields numbers of questions, steps, the cache and states
        (B, C)."""
        lab, (questions, steps, _) = self.lab, self.forks
        kept = [j for j, t in enumerate(steps) if t + 1 + room <= lab.flags.max_think]
        if lab.flags.forks and len(kept) > lab.flags.forks:
            draw = np.random.default_rng(lab.flags.seed)
            kept = draw.choice(kept, lab.flags.forks, replace=False).tolist()
        kept.sort(key=lambda j: steps[j])
        for i in range(0, len(kept), size):
            numbers = [questions[j] for j in kept[i:i + size]]
            at = [steps[j] for j in kept[i:i + size]]
            read = [lab.questions[n] + self.text(n, t) for n, t in zip(numbers, at)]
            # the batch is read up to its last fork's step: its first fork has that much more to say
            yield numbers, at, *prefill(lab, read, lab.columns + at[-1] - at[0])

    def text(self, n, stop, start=0, mode="greedy"):
        """Tokens `start` to `stop` of what the first rollout on question n says, eos after it."""
        r = self(mode)[n][0]
        return (r.trace + r.answer + [self.lab.tok.eos] * stop)[start:stop]


# ---------------------------------------------------------------- the modes

def compare_modes(lab, runs):
    """Accuracy, length and Pass@k of the modes of --mode: a sheet; and the finding, if they are
    all. runs: Runs, as for all functions here."""
    flags = lab.flags
    compared = {mode: runs(mode) for mode in modes_of(flags)}
    rows, lines = compare(compared, lab.items, lab.tok, flags.draws, lab.draft.value), []
    for mode, row in rows.items():
        numbers = [row[name] for name in ("accuracy", "std", "draws", "steps", "ended", "cut")]
        lines.append([mode, *numbers, *row["pass_at"].values()])
    passes = [f"Pass@{k}" for k in PASS_AT if k <= flags.draws]
    curves = {mode: list(row["pass_at"].items()) for mode, row in rows.items()}
    said = claims.of_modes(rows) if flags.mode == "all" else ()
    title = ("accuracy in %, mean and standard deviation over draws; "
             f"{len(lab.items)} test questions, temperature {flags.temperature:g}")
    if lab.free:
        title += "\n(a small language model is weak at sums: the probes say more than accuracies)"
    shown = sheet("modes", title,
                  ["mode", "accuracy", "±", "draws", "steps", "ended by itself, %", "cut off, %",
                   *passes], lines, 1, claims=said, plot=(
                       "Right in one of k rollouts", "k", "questions, %", curves))
    if flags.mode != "all":
        return shown, ""
    return shown, claims.finding(rows, against_greedy(compared, lab.tok))


def modes_of(flags):
    return MODES if flags.mode == "all" else [flags.mode]


def print_texts(lab, runs):
    """What the modes say about the question of --prompt, each in its first rollout."""
    for mode in modes_of(lab.flags) if lab.flags.mode != "none" else ():
        said = runs(mode)[0][0]
        print(f"\n{mode}: {lab.tok.decode(said.trace + said.answer).strip()}")


# ---------------------------------------------------------------- looking on

def watch(lab, mode, least=0.0):
    """Think in a mode without noise and look on.

    Yields, before each step is read: the numbers (R,) of the questions that read it with an entropy
    of at least `least` nats, at least one; their rows in the cache (R,); the cache; t; and the Step
    of these rows.
    """
    size = lab.flags.batch_size
    if not lab.free:
        size = max(1, size // 4)         # several variants of each row are read
    for i in range(0, len(lab.questions), size):
        cache, h = prefill(lab, lab.questions[i:i + size])
        drafts = [lab.draft(lab) for _ in h]
        for t, step in enumerate(think(lab, cache, h, drafts, mode)):
            rows = torch.nonzero(step.live & (step.entropy >= least))[:, 0]
            if len(rows):
                yield (rows + i).tolist(), rows, cache, t, Step(*(x[rows] for x in step))


def candidates(model, h):
    """The two likeliest tokens (B, 2) after states h (B, C), and their embeddings (B, 2, C)."""
    top = model.head(h).topk(2).indices
    return top, model.wte(top)


def peek(lab, runs, cache, inputs, numbers, mode, steps):
    """Read each of M inputs (B, M, C) as the thought's step steps[b] of row b, then the lag - 1
    tokens that follow that step in this mode's rollouts, the same for all M; `cache` stays as it
    was. numbers [B]: the rows' questions. Returns the states (B, M, lag, C) of every layer, the
    last after ln_f."""
    M, lag = inputs.size(1), lab.flags.lag
    lines = [runs.text(n, t + lag, t + 1, mode) for n, t in zip(numbers, steps)]
    following = lab.model.wte(torch.tensor(lines, dtype=torch.long, device=inputs.device))
    x = torch.cat([inputs.flatten(0, 1)[:, None], following.repeat_interleave(M, 0)], 1)
    states = lab.model(embeds=x, cache=cache.repeat(M), all_states=True)
    return [s.unflatten(0, (-1, M)) for s in states]


def as_text(lab, mode, most=40):
    """The first question's thought in one line: tokens as they are, mixtures as
    [first 60 % | second 40 %]. Of a free model's thought the first `most` steps."""
    cache, h = prefill(lab, lab.questions[:1])
    draft, parts = lab.draft(lab), []
    for step in itertools.islice(think(lab, cache, h, [draft], mode), most if lab.free else None):
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
    is shown next to the first. A large model (lab.free) is asked at uncertain steps only.
    """
    model, least = lab.model, lab.flags.uncertain
    found = [torch.zeros(0, 8)]      # question, step, entropy, lead, next (top-1, top-2), soon
    for numbers, rows, cache, t, step in watch(lab, "vanilla", least if lab.free else 0.0):
        soft = soft_embedding(model.wte.weight, step.indices, step.weights)[:, None]
        inputs = torch.cat([soft, candidates(model, step.h)[1]], 1)            # (B, 3, C)
        states = peek(lab, runs, cache.repeat(1, rows), inputs, numbers, "vanilla", [t] * len(rows))
        p = model.head(states[-1]).float().softmax(-1)                         # (B, 3, lag, V)
        js = js_divergence(p[:, :1], p[:, 1:])                                 # (B, 2, lag)
        place = torch.stack([torch.tensor(numbers).to(step.entropy),
                             torch.full_like(step.entropy, t + 1), step.entropy,
                             step.weights.amax(1)], 1)
        found.append(torch.cat([place, js[..., 0], js.amax(-1)], 1).cpu())
    found = torch.cat(found).double().numpy()                                  # (N, 8)
    return probe_sheets.js(found, not lab.free, least, lab.flags.lag)


WEIGHTS = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.0)


def probe_lens(lab, runs, weights=WEIGHTS):
    """The logit lens on a soft token of two candidates, w e(A) + (1 - w) e(B), at uncertain steps
    of greedy thoughts.

    The two paths are what the model says after A only and after B only, in the first of `lag`
    places where that differs. Each layer's state there, through ln_f and the head, gives their
    probabilities, of which the first's share is shown, and their ranks: a path is visible if it is
    among the ten likeliest tokens.
    """
    model, question = lab.model, []
    w, found = torch.tensor(weights, device=lab.machine.device)[:, None], []
    for numbers, steps, cache, h in runs.some_forks(max(1, lab.flags.batch_size // len(weights))):
        e = candidates(model, h)[1]
        inputs = w * e[:, None, 0] + (1 - w) * e[:, None, 1]                   # (B, M, C)
        states = peek(lab, runs, cache, inputs, numbers, "greedy", steps)      # (B, M, lag, C)
        said = model.head(states[-1][:, [0, -1]]).argmax(-1)                   # (B, 2, lag)
        differ = said[:, 0] != said[:, 1]
        row = torch.nonzero(differ.any(1))[:, 0]                               # (N,)
        at = differ[row].int().argmax(1)                                       # (N,) first place
        paths = said[row, :, at][:, None].expand(-1, len(weights), -1)         # (N, M, 2)
        states = [s[row, :, at] for s in states]                               # (N, M, C)
        states[:-1] = map(model.ln_f, states[:-1])
        layers = [in_layer(model.head(s).float(), paths) for s in states]
        found.append(torch.stack(layers, 2).cpu())                             # (N, M, layers+1, 4)
        question += [numbers[j] for j in row.tolist()]
    found = torch.cat(found) if question else torch.zeros(0, len(weights), len(model.h) + 1, 4)
    return probe_sheets.lens(found.double().numpy(), weights, question)


def in_layer(logits, paths):
    """Of logits (.., V) and two tokens (.., 2), (.., 4): the first's share of their probability,
    this probability, and how many tokens are likelier than each."""
    own = logits.gather(-1, paths)
    both = logits.softmax(-1).gather(-1, paths).sum(-1)
    ranks = [(logits > one[..., None]).sum(-1) for one in own.unbind(-1)]
    return torch.stack([own.softmax(-1)[..., 0], both, *ranks], -1)


def probe_rouge(lab, runs):
    """ROUGE-L of each mode's trace with the greedy trace: how far does it go its own way?"""
    return probe_sheets.rouge(against_greedy({mode: runs(mode) for mode in MODES}, lab.tok))


GAMMAS = (0.25, 1, 4, 16, 64, 256)
TAUS = (0.05, 0.25, 0.5, 1, 2, 4)
BETAS = (0, 0.5, 1, 2)


def probe_randomness(lab, runs, pairs=2000, most=100):
    """Randomness, the JS of two independent soft tokens of one step, against softness, the entropy
    of a soft token, in nats: over sweeps of gamma, tau and beta, at (the first `most`) uncertain
    steps of greedy thoughts."""
    questions, _, states = runs.forks
    n, found = min(most, len(questions)), {}
    logits = lab.model.head(states[:n]).float()
    best = logits.topk(min(lab.flags.top_k, logits.size(-1))).values          # others play no part
    sweep = [("vanilla", {}), ("sample", {})]
    sweep += [("dirichlet", dict(gamma=gamma)) for gamma in GAMMAS]
    sweep += [("gumbel", dict(tau=tau)) for tau in TAUS]
    sweep += [("moi", dict(moi_beta=beta)) for beta in BETAS]
    generator = torch.Generator().manual_seed(lab.flags.seed)
    for mode, changed in sweep if n else ():
        logits = best.repeat(-(-most // n), 1)
        random, soft = [], []
        for _ in range(-(-pairs // len(logits))):
            drawn = [soft_token(logits, mode, **filters(lab.flags) | changed, generator=generator)
                     for _ in range(2)]
            over_all = [torch.zeros_like(logits).scatter_(1, i, p) for i, p, _ in drawn]
            random.append(js_divergence(*over_all))
            soft.append(torch.special.entr(drawn[0][1]).sum(-1))
        of_step = [torch.stack(x).unflatten(1, (-1, n)).mean((0, 1)).cpu().numpy()
                   for x in (random, soft)]                                    # (n,) each
        name = " ".join([mode, *(f"{key} {value:g}" for key, value in changed.items())])
        found[name] = of_step
    return probe_sheets.randomness(found, questions[:n])


def probe_branching(lab, runs):
    """Forks of greedy thoughts. At an uncertain step the second candidate, or the soft token, takes
    the first one's place and the thought goes on greedily: is the rest another, is the answer, and
    who is right? The soft token takes the path that it shares up to and including the first
    difference of the two."""
    model, found = lab.model, []
    for numbers, steps, cache, h in runs.some_forks(max(1, lab.flags.batch_size // 3), room=1):
        top, e = candidates(model, h)
        p = model.head(h).float().softmax(-1).gather(1, top)                   # (B, 2)
        indices, weights, _ = soft_token(model.head(h), "vanilla", **filters(lab.flags))
        mix = soft_embedding(model.wte.weight, indices, weights)
        inputs = torch.cat([e, mix[:, None]], 1).flatten(0, 1)                 # (3 B, C)
        cache, said = cache.repeat(3), []
        h = model(embeds=inputs[:, None], cache=cache)[:, -1]
        begun = torch.cat([top, likeliest(indices, weights)[:, None]], 1)      # (B, 3)
        for i, t, three in zip(numbers, steps, begun.tolist()):
            said += [runs.text(i, t) + [token] for token in three]
        rolls = think_and_answer(lab, cache, h, "greedy", said=said)
        for b, (i, t) in enumerate(zip(numbers, steps)):
            three, wanted = rolls[3 * b:3 * b + 3], lab.items[i]["answer"]
            share = 100 * float(p[b, 1] / p[b].sum())
            found.append([t + 1, share, *fork(lab, three, wanted, t + 1), i])
    return probe_sheets.branching(np.array(found, float).reshape(-1, 10), not lab.free)


def fork(lab, three, wanted, start):
    """Of three Rollouts with the first candidate, the second and the soft token before place
    `start`, seven bools: do rest and answer of the first two differ, is each of the three right,
    does the soft one take the first's path, the second's?"""
    first, second, soft = ((r.trace + r.answer + [lab.tok.eos])[start:] for r in three)
    given = [lab.draft.value(lab.tok, r) for r in three]
    n = next((j + 1 for j, (x, y) in enumerate(zip(first, second)) if x != y), None)
    return [n is not None, given[0] != given[1], *(same_answer(one, wanted) for one in given),
            *(n is not None and soft[:n] == line[:n] for line in (first, second))]


PROBES = {
    "js": probe_js,
    "lens": probe_lens,
    "rouge": probe_rouge,
    "randomness": probe_randomness,
    "branching": probe_branching,
}
