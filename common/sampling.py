"""Samples of thoughts: soft tokens, the noise that makes them differ, how they end in an answer,
and what is measured over them.

Nothing here knows of a model: a soft token is indices and weights, noise is for such weights, and a
Rollout is token ids.
"""

import argparse
import math
from collections import Counter
from typing import NamedTuple

import numpy as np
import torch

from common.runtime import generator as numpy_generator
from common.scoring import is_correct

# ---------------------------------------------------------------- soft tokens


def filtered(logits, top_k, top_p=1.0, min_p=0.0):
    """The likeliest tokens of logits (.., V): indices and probabilities (.., W), W = min(top_k, V),
    in descending order. Those that top-p, then min-p leave out have probability 0; the others are
    renormalised after each."""
    best, indices = logits.topk(min(top_k, logits.size(-1)))
    p = best.softmax(-1)
    p = normalised(p * (p.cumsum(-1) - p < top_p))       # the token that crosses top_p stays
    return indices, normalised(p * (p >= min_p * p[..., :1]))


def normalised(p):
    return p / p.sum(-1, keepdim=True)


def soft_embedding(embeddings, indices, weights):
    """sum_i w_i e_i: embeddings (V, C), indices and weights (.., K) -> (.., C)."""
    return (weights[..., None].to(embeddings.dtype) * embeddings[indices]).sum(-2)


def likeliest(indices, weights):
    """The token of the largest weight: indices and weights (.., K) -> (..)."""
    return indices.gather(-1, weights.argmax(-1, keepdim=True))[..., 0]


def rms(embeddings):
    """Root mean square of the entries of embeddings (V, C); without gradient."""
    return embeddings.detach().square().mean().sqrt()


def mixture_entropy(indices, weights):
    """Entropy (..), in nats, of soft tokens, indices and weights (.., K), in which a token may come
    several times; 0 if it is a single token."""
    same = indices[..., :, None] == indices[..., None, :]                # (.., K, K)
    total = (same * weights[..., None, :]).sum(-1)       # of the token that is k-th, all its parts
    return -torch.xlogy(weights, total.clamp(max=1)).sum(-1)


def draw_tokens(p, uniform):
    """Tokens (.., K) drawn independently from p (.., V) with numbers (.., K) from [0, 1): where
    these fall in the cumulative distribution."""
    reached = p.cumsum(-1)
    return torch.searchsorted(reached, uniform * reached[..., -1:]).clamp(max=p.size(-1) - 1)


# ---------------------------------------------------------------- noise

TRIES = 6        # proposals for a gamma draw; all are rejected in fewer than 1 of 10^7 draws


def seeded(*key):
    """torch generator that depends only on the given integers."""
    return torch.Generator().manual_seed(int(numpy_generator(*key).integers(2 ** 62)))


def draw_noise(kind, size, generator):
    """Noise for weights of `size` (.., W), float32 on the CPU. It depends on nothing else, so that
    it can be drawn ahead.

    dirichlet: exponentials and normals for log_gamma, (.., W, 1 + 2 TRIES). Any other kind:
    g ~ Gumbel(0, 1), (.., W).
    """
    def exponential(*size):
        return torch.empty(size).exponential_(generator=generator).clamp_(min=1e-30)

    if kind == "dirichlet":
        exponentials = exponential(*size, 1 + TRIES)
        return torch.cat([exponentials, torch.randn(*size, TRIES, generator=generator)], -1)
    return -exponential(*size).log()


def log_gamma(alpha, noise):
    """Logarithms of Gamma(alpha) draws, -inf where alpha is 0; their softmax is a draw of
    Dirichlet(alpha).

    alpha (.., W), noise of draw_noise. The first proposal that Marsaglia and Tsang (2000) accept
    has the distribution Gamma(alpha + 1), and U^(1 / alpha) times it Gamma(alpha): in logarithms,
    as small alphas underflow.
    """
    boost, e, x = noise.split([1, TRIES, TRIES], -1)
    d = (alpha + 1 - 1 / 3)[..., None]
    v = (1 + x / (9 * d).sqrt()).clamp(min=1e-9) ** 3    # what is clamped is not accepted
    accepted = -e < x ** 2 / 2 + d - d * v + d * v.log()
    first = accepted.int().argmax(-1, keepdim=True)
    return (d * v).gather(-1, first)[..., 0].log() - boost[..., 0] / alpha


def gumbel_log_density(y, p, tau):
    """Log-density of a Gumbel-Softmax sample y (.., K) of weights p (.., K), which a policy
    gradient needs. On the simplex, by K - 1 of its coordinates, where K counts p_i > 0:

        ln (K - 1)! + (K - 1) ln tau + sum_i [ln p_i - (tau + 1) ln y_i] - K ln sum_i p_i y_i^-tau

    (Maddison et al. 2017, arXiv 1611.00712, definition 1).
    """
    counted = p > 0
    log_p, log_y = (torch.where(counted, x, 1).log() for x in (p, y))
    K = counted.sum(-1)
    total = (log_p - tau * log_y).masked_fill(~counted, -torch.inf).logsumexp(-1)
    parts = (log_p - (tau + 1) * log_y).sum(-1)
    return torch.lgamma(K.to(y)) + (K - 1) * math.log(tau) + parts - K * total


# ---------------------------------------------------------------- rollouts


class Rollout(NamedTuple):
    """One thought, and the answer that was decoded after it."""
    trace: list              # top-1 tokens of the thinking
    answer: list             # token ids from the answer prompt on, without eos
    ended: bool              # the thinking came to the prompt by itself
    cut: bool = False        # a limit ended the thinking or the answer


def begins(line, prompt):
    """Does a line of text begin with the whole answer prompt? Blanks at the prompt's end may still
    be to come: tokenizers join them to the word that follows."""
    return (line + prompt[len(prompt.rstrip()):]).startswith(prompt)


class Draft:
    """A Rollout in the making: what one row has said so far, token by token.

        q  q  s1  s2  \n  ###  Step  1  \n  s3  s4  \n  ###  7  eos          s: thoughts
              thinking    perhaps answer     thinking    answer

    The answer begins where the whole answer prompt begins a line. Thoughts that spell a beginning
    of the prompt are thoughts like others until it is complete; then they belong to the answer. If
    the line with the prompt is not the last one, it was a step, and thinking goes on.
    """

    def __init__(self, lab, said=()):
        """lab: has tok, prompt (text), usual (its tokens, put in where thinking is ended) and the
        flags max_think and max_new. said: tokens that the row has said before."""
        self.tok, self.prompt, self.usual = lab.tok, lab.prompt, lab.usual
        self.max_think, self.max_new = lab.flags.max_think, lab.flags.max_new
        self.said = []           # token ids
        self.line = 0            # where in them the current line begins
        self.answer = None       # where in them the answer begins
        self.due = []            # tokens of a prompt put in that are still to come
        self.thinking, self.done, self.ended, self.cut = True, False, True, False
        for token in said:
            self.say(token)

    def say(self, token):
        """The row goes on with a token: the answer may begin, or turn out to be a step."""
        self.said.append(token)
        line = self.tok.decode(self.said[self.line:])
        if "\n" in line:
            self.line = len(self.said)
            if self.ended and self.line < self.max_think:
                self.thinking = True
        elif self.thinking and begins(line, self.prompt):
            self.thinking, self.answer = False, self.line
        if not self.thinking and self.n_answer() >= self.max_new:
            self.done = self.cut = True

    def go_on(self, thought, word, stop=False):
        """The row goes on with `thought` while it thinks, with `word` while it answers. stop: the
        thinking ends here, as it does at max_think steps and at eos. Then the prompt is put in,
        except that at eos a line that began with it is the answer."""
        token, eos = thought if self.thinking else word, self.tok.eos
        full = len(self.said) >= self.max_think
        if self.thinking and (full or stop or thought == eos):
            self.thinking = False
            if full or stop or self.answer is None:
                self.answer, self.due = len(self.said), list(self.usual)
                self.ended, self.cut = False, full
        if self.due:
            token = self.due.pop(0)
        if self.done or token == eos:
            self.done = True
        else:
            self.say(token)

    def n_answer(self):
        """How many tokens of an answer the row has said."""
        return 0 if self.thinking else len(self.said) - self.answer

    def rollout(self):
        """What was said, as a Rollout."""
        return Rollout(self.said[:self.answer], self.said[self.answer:], self.ended, self.cut)


def prompt_tokens(answers, tok, prompt):
    """The tokens of the prompt in most of the answers (token ids), up to that which completes it:
    before a number, say, they are others than before a word."""
    found = Counter()
    for ids in answers:
        n = next(n for n in range(1, len(ids)) if begins(tok.decode(ids[:n]), prompt))
        found[tuple(ids[:n])] += 1
    return list(found.most_common(1)[0][0])


MAX_THINK, MAX_NEW = 40, 24      # where no gold text is longer


def limits(flags, examples, tok, prompt, usual):
    """flags with a --max-think and a --max-new that cut off no gold text of the Examples; lower
    ones that were typed stay, with a warning. Thinking needs room for the steps and for the prompt
    that ends it; --max-new is also for steps that begin with the prompt."""
    lines = [e.answer for e in examples]
    for example in examples:
        lines += [step for step in example.steps if begins(tok.decode(step), prompt)]
    think = max(sum(map(len, e.steps)) for e in examples) + len(usual)
    chosen = {}
    for name, usually, longest, what in (("max_think", MAX_THINK, think, "thinking"),
                                         ("max_new", MAX_NEW, max(map(len, lines)), "answers")):
        typed = getattr(flags, name)
        chosen[name] = typed or max(usually, longest)
        if chosen[name] < longest:
            flag = name.replace("_", "-")
            print(f"warning: --{flag} {typed} cuts off {what}; the longest has {longest} tokens")
    return argparse.Namespace(**vars(flags) | chosen)


# ---------------------------------------------------------------- measures

PASS_AT = (1, 2, 4, 8, 16, 32)


def pass_at(k, n, right):
    """Chance that one of k rollouts is right, estimated without bias from n of which some are:
    1 - C(n - right, k) / C(n, k) (Chen et al. 2021, arXiv 2107.03374, equation 1)."""
    return 1 - math.comb(n - right, k) / math.comb(n, k)


def compare(runs, items, tok, draws):
    """{mode: dict} for {mode: lists of each item's Rollouts}: accuracy (mean over draws, %), std
    (over draws), draws, steps (mean length of the thinking), ended (by itself, %), cut (by a limit,
    %), pass_at {k: %}, right (items, draws) 0 or 1."""
    rows = {}
    for mode, found in runs.items():
        right = np.array([[is_correct(tok.decode(r.answer), item["answer"]) for r in mine]
                          for mine, item in zip(found, items)], float)
        R, by_draw = right.shape[1], 100 * right.mean(0)
        flat = [r for mine in found for r in mine]
        chances = {}
        for k in PASS_AT:
            if k <= draws:
                chances[k] = 100 * np.mean([pass_at(min(k, R), R, int(n)) for n in right.sum(1)])
        rows[mode] = dict(
            accuracy=by_draw.mean(), std=by_draw.std(ddof=1) if R > 1 else 0.0, draws=R,
            steps=np.mean([len(r.trace) for r in flat]),
            ended=100 * np.mean([r.ended for r in flat]), cut=100 * np.mean([r.cut for r in flat]),
            pass_at=chances, right=right)
    return rows


def rouge_l(a, b):
    """ROUGE-L of two lists of words: F1 of their longest common subsequence (Lin 2004); 1 for two
    empty lists."""
    row = [0] * (len(b) + 1)
    for word in a:
        above, row = row, [0]
        for j, other in enumerate(b):
            row.append(above[j] + 1 if word == other else max(row[j], above[j + 1]))
    return 2 * row[-1] / (len(a) + len(b)) if a or b else 1.0


def js_divergence(p, q):
    """Jensen-Shannon divergence of distributions (.., V), in nats, from 0 to ln 2:
    H((p + q) / 2) - (H(p) + H(q)) / 2."""
    def entropy(p):
        return torch.special.entr(p).sum(-1)
    return (entropy((p + q) / 2) - (entropy(p) + entropy(q)) / 2).clamp(0, math.log(2))


def mean_and_error(x):
    """Mean of x (n,), and its standard error."""
    error = np.std(x, ddof=1) / len(x) ** 0.5 if len(x) > 1 else 0.0
    return float(np.mean(x)), float(error)
