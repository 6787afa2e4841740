"""Samples of thoughts: soft tokens, the noise that makes them differ, what is measured over them.

Nothing here knows of a model: a soft token is indices and weights, noise is for such weights, and a
thought is token ids.
"""

import math

import numpy as np
import torch

from common.runtime import generator as numpy_generator
from common.scoring import same_answer

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


def gumbel_log_density(log_y, log_p, tau):
    """Log-density of a Gumbel-Softmax sample y (.., K) of weights p (.., K), which a policy
    gradient needs, from their logarithms. By K - 1 coordinates, where K counts p_i > 0:

        ln (K - 1)! + (K - 1) ln tau + sum_i [ln p_i - (tau + 1) ln y_i] - K ln sum_i p_i y_i^-tau

    (Maddison et al. 2017, arXiv 1611.00712, definition 1).
    """
    counted = log_p > -torch.inf
    log_p, log_y = (x.masked_fill(~counted, 0) for x in (log_p, log_y))
    K = counted.sum(-1)
    total = (log_p - tau * log_y).masked_fill(~counted, -torch.inf).logsumexp(-1)
    parts = (log_p - (tau + 1) * log_y).sum(-1)
    return torch.lgamma(K.to(log_y)) + (K - 1) * math.log(tau) + parts - K * total


# ---------------------------------------------------------------- measures

PASS_AT = (1, 2, 4, 8, 16, 32)


def pass_at(k, n, right):
    """Chance that one of k rollouts is right, estimated without bias from n of which some are:
    1 - C(n - right, k) / C(n, k) (Chen et al. 2021, arXiv 2107.03374, equation 1)."""
    return 1 - math.comb(n - right, k) / math.comb(n, k)


def compare(runs, items, tok, draws, value):
    """{mode: dict} for {mode: lists of each item's Rollouts}: accuracy (mean over draws, %), std
    (over draws), draws, steps (mean length of the thinking), ended (by itself, %), cut (by a limit,
    %), pass_at {k: %}, right (items, draws) 0 or 1. value: a function from tok and a Rollout to
    the answer that it gives."""
    rows = {}
    for mode, found in runs.items():
        right = np.array([[same_answer(value(tok, r), item["answer"]) for r in mine]
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
