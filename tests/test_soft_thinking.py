"""soft_thinking.py: the soft token, the loop, the probes against plain computations, and whole runs."""

import argparse
import json
import math
import sys
from itertools import combinations
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch._dynamo.testing import CompileCounter

import coconut
import data_prep
import runtime
import soft_thinking as st
from test_parity import GOLDEN
from test_runs import gpt2_tokenizer, run as run_coconut, signals      # noqa: F401 (fixtures)
from tiny import tiny_model, weights

NOISY = ("sample", "dirichlet", "gumbel")
QUESTIONS = [[5, 9, 2], [44, 3, 17, 8, 25, 31, 7], [1], [30, 12, 12, 40, 6]]


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


def some_logits(B=6, V=40, seed=0, spread=3.0):
    return torch.randn(B, V, generator=gen(seed), dtype=torch.float64) * spread


def dense(indices, p, V):
    """Weights of a soft token as a vector over the vocabulary."""
    return torch.zeros(len(p), V, dtype=p.dtype).scatter_(1, indices, p)


# ---------------------------------------------------------------- the soft token

CASES = [pytest.param(golden, case, id=f"{name}-{i}")
         for name, golden in GOLDEN.items() for i, case in enumerate(golden["soft_thinking"])]


@pytest.mark.parametrize("golden, case", CASES)
def test_golden(golden, case):
    """Indices, weights, entropy and soft tokens of the authors' implementation, in float64."""
    shape = {k: case[k] for k in ("temperature", "top_k", "top_p", "min_p", "max_topk")}
    logits, wte = torch.tensor([case["logits"]], dtype=torch.float64), tiny_model(golden["seed"], **golden["tiny"]).wte.weight.double()
    indices, p, entropy = st.soft_token(logits, "vanilla", **shape)
    n = len(case["indices"])
    noise = torch.zeros(1, p.size(1), dtype=torch.float64)
    noise[0, :n] = torch.tensor(case["gumbel_noise"])
    same, y, _ = st.soft_token(logits, "gumbel", **shape, tau=case["gumbel_tau"], noise=noise)
    assert indices[0, :n].tolist() == case["indices"] == same[0, :n].tolist() and not p[0, n:].any() and not y[0, n:].any()
    assert entropy.item() == pytest.approx(case["entropy_nats"], abs=1e-6)
    for weight, name in ((p, ""), (y, "gumbel_")):
        assert weight[0, :n].tolist() == pytest.approx(case[f"{name}weights"], abs=1e-6)
        token = st.soft_embedding(wte, indices, weight)[0, :4]
        assert token.tolist() == pytest.approx(case[f"{name}soft_token_first4"], abs=1e-6)


def test_there_are_golden_cases():
    assert CASES


def by_hand(logits, temperature, top_k, top_p, min_p, max_topk):
    """The filters for one row, by loops over a dict {token: probability}."""
    scaled = [x / temperature for x in logits]
    total = sum(math.exp(x) for x in scaled)
    p = {i: math.exp(x) / total for i, x in enumerate(scaled)}

    def keep(best):
        return {i: p[i] / sum(p[j] for j in best) for i in best}
    ranked = sorted(p, key=p.get, reverse=True)
    p = keep(ranked[:top_k])
    n = next((n for n in range(1, len(p) + 1) if sum(p[i] for i in ranked[:n]) >= top_p), len(p))
    p = keep(ranked[:n])
    p = keep([i for i in ranked[:n] if p[i] >= min_p * p[ranked[0]]])
    return keep([i for i in ranked if i in p][:max_topk])


@pytest.mark.parametrize("shape", [
    dict(temperature=0.6, top_k=30, top_p=0.95, min_p=0.001, max_topk=10), dict(temperature=1.5, top_k=7, top_p=0.9, min_p=0.2, max_topk=40),
    dict(temperature=3.0, top_k=100, top_p=0.999, min_p=0.0, max_topk=3), dict(temperature=1.0, top_k=5, top_p=0.5, min_p=0.05, max_topk=5),
    dict(temperature=1.0, top_k=40, top_p=1e-6, min_p=0.0, max_topk=5)])
def test_filters(shape):
    """Each row is what loops by hand give, and the entropy is that of the whole distribution."""
    logits = some_logits()
    indices, p, entropy = st.soft_token(logits, "vanilla", **shape)
    for row, i, weight, h in zip(logits.tolist(), indices.tolist(), p.tolist(), entropy.tolist()):
        expected = by_hand(row, **shape)
        assert {k: w for k, w in zip(i, weight) if w} == pytest.approx(expected, abs=1e-12)
        scaled = np.exp(np.array(row) / shape["temperature"])
        q = scaled / scaled.sum()
        assert h == pytest.approx(-(q * np.log(q)).sum())


@pytest.mark.parametrize("dtype, expected", [(torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64, torch.float64)])
def test_precision(dtype, expected):
    _, p, entropy = st.soft_token(some_logits().to(dtype), "vanilla")
    assert p.dtype == entropy.dtype == expected


def test_a_discrete_soft_token_is_the_embedding():
    """Bit for bit: a thought in words is read as words are."""
    model = tiny_model()
    indices, p, _ = st.soft_token(some_logits(V=67).float(), "greedy")
    assert torch.equal(st.soft_embedding(model.wte.weight, indices, p), model.wte(some_logits(V=67).argmax(-1)))


@pytest.mark.parametrize("mode, tau", [("sample", 0.5), ("gumbel", 0.5), ("gumbel", 2.0)])
def test_argmax_follows_the_distribution(mode, tau):
    """Luce's axiom: chi-square over 1e5 draws, below the value that chance passes once in 10,000."""
    logits, n = torch.tensor([[2.0, 1.0, 0.5, 0.0, -1.0, -2.0]], dtype=torch.float64), 100_000
    expected = logits.softmax(-1)[0]
    indices, y, _ = st.soft_token(logits.expand(n, -1), mode, 1.0, top_p=1.0, min_p=0.0, tau=tau, generator=gen(1))
    counts = torch.bincount(indices.gather(1, y.argmax(1, keepdim=True))[:, 0], minlength=6)
    assert ((counts - n * expected) ** 2 / (n * expected)).sum() < 25.7             # 5 degrees of freedom
    assert ((counts - n / 6) ** 2 / (n / 6)).sum() > 1000                           # and it is not uniform


@pytest.mark.parametrize("gamma", [0.05, 1.0, 4.0, 100.0])
def test_dirichlet_moments(gamma):
    """Mean p and variance p (1 - p) / (gamma + 1), within five standard errors, also where gamma p is tiny."""
    p, n = torch.tensor([0.6, 0.25, 0.1, 0.04, 0.01]), 100_000
    indices, y, _ = st.soft_token(p.log().expand(n, -1), "dirichlet", 1.0, top_p=1.0, min_p=0.0, gamma=gamma, generator=gen(2))
    y = dense(indices, y, 5).double()
    assert torch.isfinite(y).all() and (y >= 0).all() and torch.allclose(y.sum(1), torch.ones(n, dtype=y.dtype), atol=1e-5)
    variance = p * (1 - p) / (gamma + 1)
    assert ((y.mean(0) - p).abs() < 5 * (variance / n).sqrt()).all()
    error = ((y - p) ** 2).var(0).div(n).sqrt()
    assert (((y - p) ** 2).mean(0) - variance).abs().le(5 * error).all()


@pytest.mark.parametrize("alpha", [1e-4, 0.01, 0.3, 1.0, 7.0, 400.0])
def test_log_gamma(alpha):
    """ln Gamma(alpha) has mean digamma(alpha) and variance trigamma(alpha)."""
    n = 100_000
    x = st.log_gamma(torch.full((n,), alpha), st.draw_noise("dirichlet", (n,), gen(3))).double()
    a = torch.tensor(alpha, dtype=torch.float64)
    mean, variance = torch.digamma(a), torch.polygamma(1, a)
    assert abs(x.mean() - mean) < 5 * (variance / n).sqrt()
    assert abs(x.var() / variance - 1) < 0.05
    assert st.log_gamma(torch.zeros(1), st.draw_noise("dirichlet", (1,), gen())).item() == -math.inf


def test_limits():
    """tau -> 0 is sampling with the same noise, large gamma and no noise are vanilla, top-k 1 is greedy, exactly or in the limit."""
    logits = some_logits(200)
    noise = st.draw_noise("gumbel", (200, 30), gen()).double()
    sampled = dense(*st.soft_token(logits, "sample", noise=noise)[:2], 40)
    assert torch.equal(dense(*st.soft_token(logits, "gumbel", tau=1e-6, noise=noise)[:2], 40), sampled)
    greedy = dense(*st.soft_token(logits, "greedy")[:2], 40)
    assert torch.equal(greedy.argmax(1), logits.argmax(1)) and not torch.equal(greedy, sampled)
    vanilla = dense(*st.soft_token(logits, "vanilla", max_topk=15)[:2], 40)
    assert torch.allclose(dense(*st.soft_token(logits, "dirichlet", gamma=1e9, generator=gen())[:2], 40), vanilla, atol=1e-3)
    assert torch.allclose(dense(*st.soft_token(logits, "gumbel", tau=1.0, noise=0 * noise)[:2], 40), vanilla)
    for mode in st.MODES:
        assert torch.equal(dense(*st.soft_token(logits, mode, top_k=1, generator=gen())[:2], 40), greedy)


@pytest.mark.parametrize("mode", st.MODES)
def test_a_row_does_not_depend_on_its_batch(mode):
    """With given noise; and a generator gives the noise that draw_noise gives from it."""
    logits = some_logits(7).float()
    noise = st.draw_noise(mode, (7, 30), gen())
    whole = st.soft_token(logits, mode, noise=noise)
    for b in range(7):
        alone = st.soft_token(logits[b:b + 1], mode, noise=noise[b:b + 1])
        assert all(torch.allclose(a[0], w[b], atol=1e-6) for a, w in zip(alone, whole))
    drawn = st.soft_token(logits, mode, generator=gen())
    assert all(torch.equal(a, w) for a, w in zip(drawn, whole))


# ---------------------------------------------------------------- the log-density

def logistic_grid(K, reach, n=401):
    """Points y (.., K) of the simplex as softmax of a grid, and the volume each stands for, |dy / dz| dz = prod y dz."""
    z = torch.linspace(-reach, reach, n, dtype=torch.float64)
    z = torch.stack([*torch.meshgrid(*[z] * (K - 1), indexing="ij"), torch.zeros((n,) * (K - 1), dtype=torch.float64)], -1)
    return z.softmax(-1), z.log_softmax(-1).sum(-1).exp() * (2 * reach / (n - 1)) ** (K - 1)


@pytest.mark.parametrize("tau", [0.5, 1.0, 1.5])
@pytest.mark.parametrize("p", [[0.7, 0.3], [0.5, 0.3, 0.2], [0.9, 0.06, 0.04]], ids=str)
def test_log_density_integrates_to_one(p, tau):
    """Over the simplex, in one and in two dimensions; and the part where y_i is largest has probability p_i."""
    p = torch.tensor(p, dtype=torch.float64)
    y, volume = logistic_grid(len(p), 15 / tau)
    mass = st.gumbel_log_density(y, p.expand_as(y), tau).exp() * volume
    assert mass.sum().item() == pytest.approx(1, abs=1e-3)
    for i in range(len(p)):
        assert mass[y.argmax(-1) == i].sum().item() == pytest.approx(p[i].item(), abs=0.02)


def test_log_density_of_filtered_tokens():
    """A token that was filtered away, p = 0 and y = 0, is no dimension; samples of soft_token have a density."""
    y, p = torch.tensor([[0.6, 0.4, 0.0]]), torch.tensor([[0.8, 0.2, 0.0]])
    assert torch.allclose(st.gumbel_log_density(y, p, 0.5), st.gumbel_log_density(y[:, :2], p[:, :2], 0.5))
    logits = some_logits().float()
    (_, y, _), (_, p, _) = st.soft_token(logits, "gumbel", tau=1.0, generator=gen()), st.soft_token(logits, "vanilla", max_topk=15)
    assert torch.isfinite(st.gumbel_log_density(y, p, 1.0)).all()


# ---------------------------------------------------------------- small functions

@pytest.mark.parametrize("a, b, expected", [
    ("a b c d", "a b c d", 1), ("a b c d", "e f", 0), ("a b c d", "a c d", 2 * 3 / 7), ("police killed the gunman", "police kill the gunman", 3 / 4),
    ("police killed the gunman", "the gunman kill police", 2 / 4), ("a a", "a", 2 / 3), ("", "a", 0), ("", "", 1), ("b a", "a b", 1 / 2)])
def test_rouge_l(a, b, expected):
    assert st.rouge_l(a.split(), b.split()) == pytest.approx(expected) == st.rouge_l(b.split(), a.split())


def test_js_divergence():
    """0 for equal, ln 2 for disjoint, symmetric, the mean of two Kullback-Leibler divergences between."""
    p, q = some_logits(50).softmax(-1), some_logits(50, seed=1).softmax(-1)
    m, kl = (p + q) / 2, lambda a, b: (a * (a / b).log()).sum(-1)
    js = st.js_divergence(p, q)
    assert torch.allclose(js, (kl(p, m) + kl(q, m)) / 2) and torch.equal(js, st.js_divergence(q, p))
    assert (js > 0).all() and (js < math.log(2)).all() and not st.js_divergence(p, p).any()
    assert st.js_divergence(torch.tensor([0.5, 0.5, 0, 0]), torch.tensor([0, 0, 0.1, 0.9])).item() == pytest.approx(math.log(2))


@pytest.mark.parametrize("n, right", [(1, 0), (1, 1), (6, 0), (6, 1), (6, 3), (6, 6)])
def test_pass_at(n, right):
    """The share of all k-subsets of n rollouts in which one is right."""
    for k in range(1, n + 1):
        subsets = [any(i < right for i in chosen) for chosen in combinations(range(n), k)]
        assert st.pass_at(k, n, right) == pytest.approx(sum(subsets) / len(subsets))


def test_compare(text_tok):
    """Means and deviations over draws; Pass@k from the draws; a mode without chance has its accuracy for every k."""
    say = lambda text, n=3: st.Rollout([1] * n, text_tok.encode(text), n == 3)
    items = [dict(answer="7"), dict(answer="8")]
    runs = dict(greedy=[[say("### 7")], [say("### 1")]], sample=[[say("### 7"), say("### 7", 5)], [say("### 8"), say("### 9")]])
    rows = st.compare(runs, items, text_tok, 2)
    assert rows["greedy"]["accuracy"] == 50 and rows["greedy"]["std"] == 0 and rows["greedy"]["pass_at"] == {1: 50, 2: 50}
    assert rows["sample"]["accuracy"] == 75 and rows["sample"]["std"] == pytest.approx(50 / 2 ** 0.5)
    assert rows["sample"]["pass_at"] == {1: 75, 2: 100} and rows["sample"]["right"].tolist() == [[1, 1], [1, 0]]
    assert rows["sample"]["steps"] == 3.5 and rows["sample"]["ended"] == 75


@pytest.mark.parametrize("vanilla, gumbel, right, words", [
    (1.0, 0.5, 1.0, ("vanilla goes 0 % of that way, so it follows", "gumbel goes 100 % of that way, so it escapes", "gains against greedy (+100.0")),
    (0.5, 1.0, 0.0, ("vanilla goes 100 % of that way, so it escapes", "gumbel goes 0 %", "neither clearly gains nor loses against greedy (+0.0")),
    (0.75, 0.75, 0.0, ("vanilla goes 50 % of that way, so it stays between",))])
def test_finding_is_said_from_the_numbers(vanilla, gumbel, right, words):
    row = lambda x: dict(right=np.full((3, 2), x), pass_at={1: 1.0, 2: 2.0})
    rows = {mode: row(right if mode == "gumbel" else 0.0) for mode in st.MODES}
    rouge = {mode: np.full((3, 2), x) for mode, x in dict(greedy=1, sample=0.5, vanilla=vanilla, dirichlet=0.6, gumbel=gumbel).items()}
    assert all(word in st.finding(rows, rouge) for word in words)
    rouge["sample"][:] = 1
    assert "raise --temperature" in st.finding(rows, rouge)


# ---------------------------------------------------------------- the loop, on the tiny model

def settings(*argv, **changed):
    """Flags, with what a run would add."""
    flags = st.parse_flags(["--temperature", "2", "--max-think", "9", "--max-new", "6", "--draws", "3", *argv])
    return argparse.Namespace(**vars(flags) | dict(columns=30) | changed)


MARKS = st.Marks(eos=62, markers=(50, 21), usual=50)


def rollouts(model, mode, machine, flags=None, marks=MARKS, questions=QUESTIONS):
    with torch.no_grad():
        return st.rollouts(model, questions, mode, flags or settings(), marks, machine)


def plain_rollout(model, question, mode, flags, marks, noise=None, answer_noise=None):
    """One rollout by its definition: everything read anew at each step, without cache, padding or batch."""
    x, trace, confident, token = model.wte(torch.tensor(question)), [], 0, marks.usual
    for t in range(flags.max_think):
        logits = model.head(model(embeds=x[None])[:, -1])
        indices, p, entropy = st.soft_token(logits, mode, **st.settings(flags), noise=None if noise is None else noise[t])
        top1 = indices[0, p[0].argmax()].item()
        confident = confident + 1 if entropy < flags.cold_stop_entropy else 0
        if top1 in marks.markers:
            token = top1
        if top1 in (marks.eos, *marks.markers) or (mode in st.SOFT and confident >= flags.cold_stop_steps):
            break
        trace.append(top1)
        x = torch.cat([x, (p[0, :, None] * model.wte(indices[0])).sum(0)[None]])
    answer = []
    while token != marks.eos and len(answer) < flags.max_new:
        answer.append(token)
        x = torch.cat([x, model.wte(torch.tensor([token]))])
        logits = model.head(model(embeds=x[None])[:, -1])
        token = logits.argmax().item()
        if answer_noise is not None:
            indices, p, _ = st.soft_token(logits, "sample", flags.answer_temperature, flags.top_k, flags.answer_top_p, 0.0, flags.top_k,
                                          noise=answer_noise[len(answer) - 1])
            token = indices[0, p[0].argmax()].item()
    return trace, answer


@pytest.mark.parametrize("mode", st.MODES)
def test_rollouts_are_their_definition(model, machine, mode):
    """Batched, padded, cached, from a shared prefill: each rollout is that of a plain loop with the same noise. Cold Stop
    and the marker end some of them."""
    marks, flags = MARKS._replace(markers=tuple(range(10)), usual=7), settings(cold_stop_entropy=1.9, cold_stop_steps=4)
    found = rollouts(model, mode, machine, flags, marks)
    assert [len(row) for row in found] == [1 if mode in ("greedy", "vanilla") else 3] * 4
    for i, row in enumerate(found):
        for d, rollout in enumerate(row):
            own = gen(int(runtime.generator(flags.seed, i, d).integers(2 ** 62)))
            noise = None if mode in ("greedy", "vanilla") else st.draw_noise(mode, (9, 30), own)[:, None]
            assert rollout[:2] == plain_rollout(model, QUESTIONS[i], mode, flags, marks, noise)
    flat = [r for row in found for r in row]
    assert all(r.answer[0] in marks.markers for r in flat)
    if mode in NOISY:
        assert len({tuple(r.trace) for r in flat}) > 4 and {r.ended for r in flat} == {True, False}


@pytest.mark.parametrize("mode", ["vanilla", "dirichlet", "gumbel"])
def test_batch_size_changes_nothing(model, machine, mode):
    whole = rollouts(model, mode, machine)
    for size in (1, 4, 7):
        assert rollouts(model, mode, machine, settings("--batch-size", str(size))) == whole
    assert rollouts(model, mode, machine, settings("--seed", "1")) != whole or mode == "vanilla"


@pytest.mark.parametrize("mode", NOISY)
def test_shared_prefill(model, machine, mode):
    """Rollouts of a repeated cache are those of as many prefills."""
    flags = settings()
    noise = st.draw_noise(mode, (9, 6, 30), gen())
    with torch.no_grad():
        cache, h = st.prefill(model, QUESTIONS[:2], flags, MARKS, machine)
        shared = st.roll(model, cache.repeat(3), h.repeat_interleave(3, 0), mode, flags, MARKS, noise)
        cache, h = st.prefill(model, [q for q in QUESTIONS[:2] for _ in range(3)], flags, MARKS, machine)
        assert st.roll(model, cache, h, mode, flags, MARKS, noise) == shared


@pytest.mark.parametrize("marker_at", [0, 3, 8, None])
def test_greedy_is_plain_decoding(model, machine, marker_at):
    """Until its marker and on after it, mode greedy is model.generate, token for token; also with a warm answer temperature."""
    plain = model.generate(QUESTIONS, 15, MARKS.eos)
    for i, line in enumerate(plain):
        marker = line[marker_at] if marker_at is not None else 60
        flags, marks = settings("--answer-temperature", "1"), st.Marks(62, (marker,), marker)
        (trace, answer, ended), = rollouts(model, "greedy", machine, flags, marks)[i]
        n = line.index(marker) if marker in line else len(line)
        if n < 9:
            assert ended and trace == line[:n] and trace + answer == line[:n + 6]
        else:
            assert not ended and trace == line[:9] and answer[0] == marker


def test_modes_agree_at_top_k_1(model, machine):
    """One token left: every mode thinks what greedy thinks."""
    flags = settings("--top-k", "1")
    greedy = rollouts(model, "greedy", machine, flags)
    assert all(r == row[0] for mode in st.MODES for row, mine in zip(greedy, rollouts(model, mode, machine, flags)) for r in mine)


def test_gumbel_with_small_tau_samples(model, machine):
    flags = settings("--tau", "1e-5")
    assert rollouts(model, "gumbel", machine, flags) == rollouts(model, "sample", machine, flags)


def test_answers_with_a_temperature(model, machine):
    """A warm answer is drawn token by token, also after vanilla thinking; a narrow top-p makes it greedy again."""
    cold = [row[0].answer for row in rollouts(model, "vanilla", machine)]
    warm = rollouts(model, "vanilla", machine, settings("--answer-temperature", "2"))
    assert {len(row) for row in warm} == {3} and len({tuple(r.answer) for row in warm for r in row}) > 4
    flags = settings("--answer-temperature", "2")
    for i, row in enumerate(rollouts(model, "gumbel", machine, flags)):
        for d, rollout in enumerate(row):
            own = gen(int(runtime.generator(flags.seed, i, d).integers(2 ** 62)))
            noise = [st.draw_noise(mode, (n, 30), own)[:, None] for mode, n in (("gumbel", 9), ("sample", 6))]
            assert rollout[:2] == plain_rollout(model, QUESTIONS[i], "gumbel", flags, MARKS, *noise)
    narrow = rollouts(model, "vanilla", machine, settings("--answer-temperature", "2", "--answer-top-p", "1e-6"))
    assert [[r.answer for r in row] for row in narrow] == [[answer] * 3 for answer in cold]


@pytest.mark.parametrize("mode, entropies, expected", [
    ("vanilla", [0, 0, 0, 1, 1, 1, 1, 1, 1], 2), ("vanilla", [0, 0, 1, 0, 0, 1, 0, 0, 0], 8), ("vanilla", [1, 0, 0, 1, 0, 0, 1, 0, 0], 9),
    ("gumbel", [1, 1, 0, 0, 0, 0, 0, 0, 0], 4), ("dirichlet", [0.01] * 9, 9), ("greedy", [0] * 9, 9), ("sample", [0] * 9, 9)])
def test_cold_stop(model, machine, monkeypatch, mode, entropies, expected):
    """The third confident step in a row becomes the marker; an uncertain step starts the count again, as does an entropy
    at the bound; words alone have no Cold Stop. Rows count for themselves."""
    turn = iter([*entropies, *[1] * 9])

    def scripted(logits, *args, **kwargs):
        indices, p, _ = st_soft_token(logits, "greedy")
        entropy = torch.full((len(logits),), float(next(turn)))
        entropy[1:] = 1.0
        return torch.where(indices >= 0, 33, 0), p, entropy
    st_soft_token = st.soft_token
    monkeypatch.setattr(st, "soft_token", scripted)
    flags = settings("--draws", "1", cold_stop_steps=3)
    with torch.no_grad():
        cache, h = st.prefill(model, QUESTIONS, flags, MARKS, machine)
        found = st.roll(model, cache, h, mode, flags, MARKS, noise=torch.zeros(9, 4, 30))
    assert [len(r.trace) for r in found] == [expected, 9, 9, 9] and all(r.answer[0] == MARKS.usual and not r.ended for r in found)


def test_eos_ends_thinking(model, machine):
    """A model that wants to stop is made to answer."""
    before = rollouts(model, "greedy", machine)[0][0].trace
    (trace, answer, ended), = rollouts(model, "greedy", machine, marks=MARKS._replace(eos=before[3]))[0]
    assert trace == before[:before.index(before[3])] and not ended and answer[0] == MARKS.usual


def test_a_step_is_compiled_once(model, machine):
    """Thinking and answering, in all modes and batches of one size, run one compiled graph."""
    flags = settings("--batch-size", "6")                    # 2 questions, 3 draws each
    plain = rollouts(model, "gumbel", machine, flags)
    counter = CompileCounter()
    model.step = torch.compile(model.forward, backend=counter)
    assert rollouts(model, "gumbel", machine, flags) == plain
    rollouts(model, "dirichlet", machine, flags)
    assert counter.frame_count == 1


# ---------------------------------------------------------------- the probes, against plain computations

@pytest.fixture
def lab(model, machine):
    flags = settings("--lag", "3", "--uncertain", "1.5", "--batch-size", "8")
    known = {mode: rollouts(model, mode, machine, flags) for mode in st.MODES}
    tok = SimpleNamespace(decode=lambda ids: " ".join(f"w{i}" for i in ids).replace("w50 ", "### "))
    return st.Lab(model, QUESTIONS, [dict(answer="w1")] * 4, known.get, tok, flags, MARKS, machine)


def thoughts(lab, mode):
    """For each question: the embeddings (T, C) read before step t, its weights, its entropy, by plain loops."""
    for question, (r, *_) in zip(lab.questions, lab.runs(mode)):
        x = lab.model.wte(torch.tensor(question))
        for t in range(len(r.trace)):
            logits = lab.model.head(lab.model(embeds=x[None])[:, -1])
            soft = st.soft_embedding(lab.model.wte.weight, *st.soft_token(logits, "vanilla", **st.settings(lab.flags))[:2])
            own = soft if mode == "vanilla" else lab.model.wte(logits.argmax(-1))
            entropy = torch.special.entr((logits / lab.flags.temperature).softmax(-1)).sum().item()
            yield r.trace + r.answer, t, x, logits, soft, entropy
            x = torch.cat([x, own])


@torch.no_grad()
def test_probe_js(lab):
    """Means by step and over all and the uncertain steps are those of full readings of each sequence."""
    expected = []
    for line, t, x, logits, soft, entropy in thoughts(lab, "vanilla"):
        top = logits.topk(2).indices[0]
        p = []
        for e in (soft, lab.model.wte(top[:1]), lab.model.wte(top[1:])):
            h = lab.model(embeds=torch.cat([x, e, lab.model.wte(torch.tensor(line[t + 1:t + 3]))])[None])[0, len(x):]
            p.append(lab.model.head(h).softmax(-1))
        js = [[st.js_divergence(a, b).item() for a, b in zip(p[0], other)] for other in p[1:]]
        expected.append((t + 1, entropy, js[0][0], js[1][0], max(js[0]), max(js[1])))
    first, histogram = st.probe_js(lab)
    expected = np.array(expected)
    rows = {row[0]: row[1:] for row in first["rows"]}
    for name, chosen in ((1, expected[:, 0] == 1), (9, expected[:, 0] == 9), ("all", expected[:, 0] > 0), ("uncertain", expected[:, 1] >= 1.5)):
        assert rows[name] == pytest.approx([chosen.sum(), *expected[chosen, 1:].mean(0)], abs=1e-4) and chosen.any()
    assert [sum(row[j] for row in histogram["rows"]) for j in range(1, 7)] == pytest.approx([100] * 6)


@torch.no_grad()
def test_probe_lens(lab):
    """The share of the first path by layer, from full readings."""
    shares, weights = [], (1.0, 0.6, 0.0)
    for line, t, x, logits, _, entropy in thoughts(lab, "greedy"):
        if entropy < lab.flags.uncertain:
            continue
        e = lab.model.wte(logits.topk(2).indices[0])
        states = [lab.model(embeds=torch.cat([x, (w * e[0] + (1 - w) * e[1])[None], lab.model.wte(torch.tensor(line[t + 1:t + 3]))])[None],
                            all_states=True) for w in weights]
        said = [lab.model.head(s[-1][0, len(x):]).argmax(-1).tolist() for s in (states[0], states[-1])]
        at = next((j for j, (a, b) in enumerate(zip(*said)) if a != b), None)
        if at is None:
            continue
        paths = [s[at] for s in said]
        read = [[s[0, len(x) + at] for s in row] for row in states]
        p = torch.stack([torch.stack([lab.model.head(s if i == 3 else lab.model.ln_f(s)).softmax(-1)[paths] for i, s in enumerate(row)]) for row in read])
        shares.append(p[..., 0] / p.sum(-1))
    (got,) = st.probe_lens(lab, weights)
    assert len(shares) > 5 and f"at {len(shares)} forks" in got["title"] and [row[0] for row in got["rows"]] == list(weights)
    for row, expected in zip(got["rows"], torch.stack(shares).mean(0).tolist()):
        assert row[1:-1] == pytest.approx(expected, abs=1e-4) and 0 < row[-1] <= 1
    assert got["rows"][0][-2] > 0.5 > got["rows"][-1][-2]


@torch.no_grad()
def test_probe_branching(lab):
    """Each fork, continued by plain decoding of question, greedy trace and candidate."""
    expected = []
    for line, t, x, logits, soft, entropy in thoughts(lab, "greedy"):
        if entropy < lab.flags.uncertain or t + 1 == lab.flags.max_think:
            continue
        top, question = logits.topk(2).indices[0].tolist(), lab.questions[[len(q) for q in lab.questions].index(len(x) - t)]
        rest = [sum(plain_rollout(lab.model, question + line[:t] + [token], "greedy",
                                  SimpleNamespace(**vars(lab.flags) | dict(max_think=lab.flags.max_think - t - 1)), MARKS), []) for token in top]
        p = logits.softmax(-1)[0, top]
        expected.append((t + 1, 100 * (p[1] / p.sum()).item(), rest[0] != rest[1]))
        assert rest[0][:len(line) - t - 1] == line[t + 1:]       # the first candidate is the greedy thought itself
    (got,) = st.probe_branching(lab)
    expected, rows = np.array(expected), {row[0]: row[1:] for row in got["rows"]}
    assert rows["all"][:3] == pytest.approx([len(expected), expected[:, 1].mean(), 100 * expected[:, 2].mean()], abs=1e-3)
    for t in set(expected[:, 0]):
        assert rows[int(t)][0] == (expected[:, 0] == t).sum()
    assert rows["all"][7] > rows["all"][8]                      # the soft token takes the first one's path more often


def test_branching_counts_right_answers_and_paths(lab, monkeypatch):
    """Of three given continuations: whose answer is right, and whose path the soft token takes."""
    say = lambda *ids: st.Rollout(list(ids), [50, ids[-1]], True)
    three = [say(4, 8, 1), say(4, 9, 2), say(4, 9, 1)]
    monkeypatch.setattr(st, "roll", lambda model, cache, h, *args, **kwargs: three * (len(h) // 3))
    with torch.no_grad():
        (got,) = st.probe_branching(lab)
    for row in got["rows"]:
        assert row[3:] == [100, 100, 100, 0, 100, 0, 100]


@torch.no_grad()
def test_probe_randomness(lab):
    """Vanilla has no randomness, sampling no softness; both noises tend to vanilla or to sampling at their ends."""
    lab.flags.top_k = lab.flags.max_topk = 15
    (got,) = st.probe_randomness(lab)
    rows = {name: (random, soft) for name, random, soft in got["rows"]}
    assert rows["vanilla"][0] == 0 and rows["sample"][1] == 0 and rows["vanilla"][1] > 0.5 and rows["sample"][0] > 0.2
    assert rows["dirichlet gamma 256"] == pytest.approx(rows["vanilla"], abs=0.05)
    assert rows["gumbel tau 0.05"] == pytest.approx(rows["sample"], abs=0.1)
    randomness = [rows[f"dirichlet gamma {g}"][0] for g in (0.25, 1, 4, 16, 64)]
    assert randomness == sorted(randomness, reverse=True) and all(0 <= r <= math.log(2) for r, _ in rows.values())


@torch.no_grad()
def test_probe_rouge(lab):
    (got,) = st.probe_rouge(lab)
    rows = {name: rest for name, *rest in got["rows"]}
    assert rows["greedy"] == [1, 0, 100] and set(rows) == set(st.MODES) and rows["sample"][0] < 1
    words = lambda r: lab.tok.decode(r.trace).split()
    greedy = [words(row[0]) for row in lab.runs("greedy")]
    assert rows["gumbel"][0] == pytest.approx(np.mean([st.rouge_l(words(r), g) for row, g in zip(lab.runs("gumbel"), greedy) for r in row]))


@torch.no_grad()
def test_probes_where_nothing_is_uncertain(lab, capsys):
    """Or where every thought ends at once: tables without rows, and a hint."""
    lab.flags.uncertain = 99.0
    for name in ("lens", "randomness", "branching"):
        (got,) = getattr(st, f"probe_{name}")(lab)
        st.show(got)
        assert got["rows"] == [] and "--uncertain" in capsys.readouterr().out
    assert st.probe_js(lab)[0]["rows"][-1][1:] == [0] + [None] * 5
    ended = lab._replace(marks=MARKS._replace(markers=tuple(range(67))))
    assert st.probe_js(ended)[0]["rows"][0][:2] == ["all", 0] and st.probe_randomness(ended)[0]["rows"] == []


# ---------------------------------------------------------------- whole runs

SMALL = "--updates 3 --n 3 --draws 2 --max-think 6 --max-new 4 --uncertain 0.5 --device cpu --dtype float32".split()


def run(argv):
    """`python soft_thinking.py ARGV` in this process; returns the exit code."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(sys, "argv", ["soft_thinking.py", *map(str, argv)])
        runtime.run_main(st.main, data_prep.DataError)
    return stop.value.code or 0


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("soft") / "mini"
    data_prep.write_dataset(folder, data_prep.prosqa_mini((64, 4, 6)))
    return folder


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    """The folder of a first run with the small model trained in it, and what was printed, nothing being given but the data."""
    out = tmp_path_factory.mktemp("run") / "out"
    with pytest.MonkeyPatch.context() as patch:
        lines = []
        patch.setattr("builtins.print", lambda *x, sep=" ", **kw: lines.append(sep.join(map(str, x))))
        assert run(["--data", data, "--out", out, *SMALL]) == 0
    return out, "\n".join(lines)


def test_a_run_from_nothing(trained, data):
    """Trains, prints the table, all probes and the finding, and writes each table as JSON."""
    out, text = trained
    tables = ["modes", "js", "js-histogram", "lens", "rouge", "randomness", "branching"]
    assert sorted(p.name for p in out.iterdir()) == sorted([f"{t}.json" for t in tables] + ["cot.pt"])
    modes = json.loads((out / "modes.json").read_text())
    assert [row[0] for row in modes["rows"]] == list(st.MODES) and [row[3] for row in modes["rows"]] == [1, 2, 1, 2, 2]
    assert modes["columns"][-2:] == ["Pass@1", "Pass@2"] and modes["n"] == 3 and modes["flags"]["draws"] == 2
    assert modes["finding"] and modes["finding"] in text and "test question 1" in text and "vanilla thinks" in text
    for name in tables:
        t = json.loads((out / f"{name}.json").read_text())
        assert t["title"] in text and all(len(row) == len(t["columns"]) for row in t["rows"])


def test_the_second_start_loads_the_model(trained, data, capsys):
    """Nothing is trained again; one probe or one mode alone is one table."""
    out, _ = trained
    before = (out / "cot.pt").stat().st_mtime_ns
    for argv, name in ((["--probe", "randomness"], "randomness"), (["--mode", "dirichlet"], "dirichlet")):
        assert run(["--data", data, "--out", out, *SMALL, *argv]) == 0
        text = capsys.readouterr().out
        assert name in text and "training a small one" not in text and "Finding" not in text and "logit lens" not in text
    assert "randomness and" not in text and (out / "cot.pt").stat().st_mtime_ns == before


def test_the_model_is_coconuts(trained, data, tmp_path, capsys):
    """The short loop trains what coconut.py --method cot trains, and coconut.py evaluates its checkpoint as greedy thinking."""
    out, _ = trained
    assert run_coconut(["--recipe", "prosqa-mini", "--data", data, "--method", "cot", "--stage-max", "0", "--steps-last", "3", "--warmup", "20",
                        "--device", "cpu", "--dtype", "float32", "--out", tmp_path / "cot"]) == 0
    ours, theirs = (runtime.load_checkpoint(path) for path in (out / "cot.pt", tmp_path / "cot" / "last.pt"))
    assert ours["tokenizer"] == theirs["tokenizer"] and ours["config"] == theirs["config"]
    assert all(torch.allclose(ours["model"][k], v, atol=1e-5) for k, v in theirs["model"].items())
    capsys.readouterr()
    assert run_coconut(["--eval-only", out / "cot.pt", "--device", "cpu"]) == 0
    assert "cot on" in capsys.readouterr().out


def test_a_trained_model_ends_its_thinking(tmp_path, capsys):
    """Problems of one and of two steps, learned by coconut.py: mode greedy has its accuracy, thinks as long as the steps
    are and ends by itself; Cold Stop after two confident steps cuts soft thinking, not words."""
    splits = {s: [dict(question=f"{'one' if n == 1 else 'two'} {i}", steps=["x"] * n, answer=str(n))
                  for i in numbers for n in (1, 2)] for s, numbers in dict(train=range(40), valid=range(40, 44), test=range(44, 50)).items()}
    data_prep.write_dataset(tmp_path / "lengths", splits)
    argv = ("--method cot --stage-max 0 --steps-last 150 --n-layer 1 --n-head 2 --n-embd 32 --batch-size 8 --lr 1e-2 --device cpu "
            "--dtype float32 --max-new 8").split()
    assert run_coconut([*argv, "--data", tmp_path / "lengths", "--out", tmp_path / "cot"]) == 0
    final = json.loads((tmp_path / "cot" / "metrics.jsonl").read_text().splitlines()[-1])
    assert final["test_accuracy"] == 1

    def modes(*more):
        assert run(["--model", tmp_path / "cot" / "best.pt", "--draws", "2", "--probe", "none", "--out", tmp_path / "soft", *more]) == 0
        return {row[0]: row for row in json.loads((tmp_path / "soft" / "modes.json").read_text())["rows"]}
    steps = final["tokens"] - 2                                                # "### " and the number are the answer
    for row in modes().values():
        assert row[1] == 100 and row[4] == steps > 1 and row[5] == 100
    assert "sampling never left the greedy trace" in capsys.readouterr().out
    rows = modes("--cold-stop-entropy", "1", "--cold-stop-steps", "2")
    assert [row[4] for row in rows.values()] == [steps, steps, 1, 1, 1] and rows["sample"][5] == 100 > rows["vanilla"][5]


def test_released_weights(data, tmp_path, gpt2_tokenizer, capsys):
    """--model with a pytorch_model.bin thinks with the gpt2 tokenizer; weights of another vocabulary are refused."""
    torch.save(weights(vocab_size=258, n_positions=800, n_layer=1), tmp_path / "w.bin")
    assert run(["--model", tmp_path / "w.bin", "--data", data, "--out", tmp_path / "out", *SMALL]) == 0
    assert "ROUGE-L" in capsys.readouterr().out
    torch.save(weights(vocab_size=90, n_layer=1), tmp_path / "w.bin")
    assert run(["--model", tmp_path / "w.bin", "--data", data, "--out", tmp_path / "out", *SMALL]) == 2
    assert "w.bin" in capsys.readouterr().err


def check_refusal(argv, capsys, *words):
    """Exit code 2 and one sentence on stderr that has the words; a traceback would fail the call."""
    capsys.readouterr()
    assert run(argv) == 2
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("soft_thinking.py: ")]
    assert len(error) == 1 and all(str(word) in error[0] for word in words), error


@pytest.mark.parametrize("argv, words", [
    (["--model", "nowhere.pt"], ("nowhere.pt",)), (["--model", "nowhere.bin"], ("nowhere.bin",)), (["--data", "/no/where"], ("/no/where",)),
    (["--data", "{data}", "--out", "{out}", "--updates", "4"], ("cot.pt", "--out")), (["--data", "{data}", "--out", "{out}", "--seed", "1"], ("cot.pt",)),
    (["--model", "{out}/cot.pt", "--max-think", "240"], ("--max-think 240", "256")), (["--model", "{out}/modes.json"], ("modes.json",)),
    (["--model", "{out}/cot.pt", "--device", "tpu9"], ("tpu9",)), (["--model", "{out}/cot.pt", "--out", "{out}/modes.json"], ("modes.json",))])
def test_refusals(trained, data, tmp_path, monkeypatch, capsys, argv, words):
    monkeypatch.chdir(tmp_path)
    check_refusal([*SMALL, *(a.format(out=trained[0], data=data) for a in argv)], capsys, *words)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["garbage", "no-cot", "long"])
def test_models_and_data_that_do_not_fit(trained, data, tmp_path, capsys, kind):
    out, argv = tmp_path / "out", ["--model", tmp_path / "m.pt", "--data", data]
    if kind == "garbage":
        (tmp_path / "m.pt").write_bytes(bytes(range(256)) * 9)
    elif kind == "no-cot":
        state = runtime.load_checkpoint(trained[0] / "cot.pt")
        runtime.save_checkpoint(tmp_path / "m.pt", state | dict(flags=state["flags"] | dict(method="no-cot")))
    else:
        splits = data_prep.chains((2, 2, 2))
        splits["train"][0]["question"] += " pens" * 300
        data_prep.write_dataset(tmp_path / "long", splits)
        argv = ["--data", tmp_path / "long"]
    check_refusal([*argv, "--out", out, *SMALL], capsys, dict(garbage="m.pt", long="256").get(kind, "--method no-cot"))
    assert not (out / "cot.pt").exists()


@pytest.mark.parametrize("argv, word", [
    ("--mode magic", "--mode"), ("--probe magic", "--probe"), ("--mode none --probe none", "--mode none"), ("--tau 0", "--tau"), ("--top-p 2", "--top-p"),
    ("--top-k 0", "--top-k"), ("--gamma -1", "--gamma"), ("--temperature 0", "--temperature"), ("--draws 0", "--draws"), ("--min-p x", "--min-p"),
    ("--cold-stop-steps 0", "--cold-stop-steps"), ("--temperature nan", "--temperature"), ("--answer-temperature 1e-30", "--answer-temperature"), ("--answer-temperature x", "--answer-t")])
def test_bad_flags(argv, word, capsys):
    with pytest.raises(SystemExit) as stop:
        st.parse_flags(argv.split())
    assert stop.value.code == 2 and word in capsys.readouterr().err


@pytest.mark.parametrize("argv, mode, probe", [("", "all", "all"), ("--probe js", "none", "js"), ("--probe all", "none", "all"), ("--probe none", "all", "none"),
                                               ("--mode gumbel", "gumbel", "none"), ("--mode none", "none", "all"), ("--mode all --probe js", "all", "js")])
def test_what_is_run(argv, mode, probe):
    flags = st.parse_flags(argv.split())
    assert (flags.mode, flags.probe) == (mode, probe)


def test_interrupted(trained, data, capsys, monkeypatch):
    def stop(*args):
        raise KeyboardInterrupt
    monkeypatch.setattr(st, "rollouts", stop)
    assert run(["--model", trained[0] / "cot.pt", *SMALL, "--out", trained[0], "--mode", "greedy"]) == 130
    assert "stopped" in capsys.readouterr().out


def test_plots(trained, tmp_path, monkeypatch, capsys):
    """A figure for each probe's table, with its numbers in it, where matplotlib is; a sentence where it is not."""
    argv, drawn = ["--model", trained[0] / "cot.pt", *SMALL, "--out", tmp_path / "out", "--plot"], {}
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    check_refusal(argv, capsys, "matplotlib")
    assert not (tmp_path / "out").exists()

    def subplots(figsize):
        lines = []
        axis = SimpleNamespace(plot=lambda x, y, **kw: lines.append(list(y)), set=lambda **kw: None, legend=lambda: None)
        return SimpleNamespace(savefig=lambda path, dpi: drawn.update({path: lines})), axis
    monkeypatch.setattr(st, "pyplot", lambda: SimpleNamespace(subplots=subplots))
    assert run(argv) == 0
    assert set(drawn) == {str(tmp_path / "out" / f"{n}.png") for n in ("branching", "js", "js-histogram", "lens", "randomness", "rouge")}
    rouge = json.loads((tmp_path / "out" / "rouge.json").read_text())["rows"]
    assert [row[1] for row in rouge] in drawn[str(tmp_path / "out" / "rouge.png")]


def test_a_thought_as_text(lab):
    """Every token with a weight from 1 % on, a mixture in brackets."""
    tok = SimpleNamespace(decode=lambda ids: f" w{ids[0]}")
    with torch.no_grad():
        text = st.as_text(lab._replace(tok=tok), "vanilla")
    steps = [indices for _, t, x, logits, *_ in thoughts(lab._replace(questions=QUESTIONS[:1]), "vanilla")
             for indices in [st.soft_token(logits, "vanilla", **st.settings(lab.flags))[:2]]]
    assert text.count("[") == sum(((p >= 0.01).sum() > 1).item() for _, p in steps) > 3
    assert text.startswith(f"[ w{steps[0][0][0, 0]} {100 * steps[0][1][0, 0]:.0f} %")
