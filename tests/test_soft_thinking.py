"""soft_thinking.py and probe_soft.py: the soft token, the loop, the probes against plain
computations, and whole runs."""

import argparse
import contextlib
import functools
import io
import itertools
import json
import math
import runpy
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch._dynamo.testing import CompileCounter

import codi
import data_prep
import probe_soft
import soft_thinking as st
from common import claims, rollouts as rolls, runtime, sampling, sheets
from common.lab import Lab
from common.puzzles import chains, prosqa_mini
from common.text import COCONUT_MARK, Example, Tokenizer
from common.weights import load_checkpoint
from conftest import ROOT
from test_parity import GOLDEN
from test_runs import run as run_coconut
from tiny import tiny_model, weights, write_lengths

NOISY = ("sample", "dirichlet", "gumbel", "moi")
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
         for name, golden in GOLDEN.items()
         for i, case in enumerate(golden.get("soft_thinking", ()))]


@pytest.mark.parametrize("golden, case", CASES)
def test_golden(golden, case):
    """Indices, weights, entropy and soft tokens of the authors' implementation, in float64."""
    shape = {k: case[k] for k in ("temperature", "top_k", "top_p", "min_p", "max_topk")}
    logits = torch.tensor([case["logits"]], dtype=torch.float64)
    wte = tiny_model(golden["seed"], **golden["tiny"]).wte.weight.double()
    indices, p, entropy = st.soft_token(logits, "vanilla", **shape)
    n = len(case["indices"])
    noise = torch.zeros(1, p.size(1), dtype=torch.float64)
    noise[0, :n] = torch.tensor(case["gumbel_noise"])
    same, y, _ = st.soft_token(logits, "gumbel", **shape, tau=case["gumbel_tau"], noise=noise)
    assert indices[0, :n].tolist() == case["indices"] == same[0, :n].tolist()
    assert not p[0, n:].any() and not y[0, n:].any()
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
    dict(temperature=0.6, top_k=30, top_p=0.95, min_p=0.001, max_topk=10),
    dict(temperature=1.5, top_k=7, top_p=0.9, min_p=0.2, max_topk=40),
    dict(temperature=3.0, top_k=100, top_p=0.999, min_p=0.0, max_topk=3),
    dict(temperature=1.0, top_k=5, top_p=0.5, min_p=0.05, max_topk=5),
    dict(temperature=1.0, top_k=40, top_p=1e-6, min_p=0.0, max_topk=5)])
def test_filters(shape):
    """Each row is what loops by hand give, and the entropy is that of the whole distribution."""
    logits = some_logits()
    indices, p, entropy = st.soft_token(logits, "vanilla", **shape)
    for row, i, weight, h in zip(*(x.tolist() for x in (logits, indices, p, entropy))):
        expected = by_hand(row, **shape)
        assert {k: w for k, w in zip(i, weight) if w} == pytest.approx(expected, abs=1e-12)
        scaled = np.exp(np.array(row) / shape["temperature"])
        q = scaled / scaled.sum()
        assert h == pytest.approx(-(q * np.log(q)).sum())


@pytest.mark.parametrize("dtype, expected", [
    (torch.bfloat16, torch.float32), (torch.float32, torch.float32),
    (torch.float64, torch.float64)])
def test_precision(dtype, expected):
    _, p, entropy = st.soft_token(some_logits().to(dtype), "vanilla")
    assert p.dtype == entropy.dtype == expected


def test_a_discrete_soft_token_is_the_embedding():
    """Bit for bit: a thought in words is read as words are."""
    model, logits = tiny_model(), some_logits(V=67)
    indices, p, _ = st.soft_token(logits.float(), "greedy")
    token = st.soft_embedding(model.wte.weight, indices, p)
    assert torch.equal(token, model.wte(logits.argmax(-1)))


@pytest.mark.parametrize("mode, tau", [("sample", 0.5), ("gumbel", 0.5), ("gumbel", 2.0)])
def test_argmax_follows_the_distribution(mode, tau):
    """Luce's axiom: chi-square over 1e5 draws, below the value that chance passes once in
    10,000."""
    logits = torch.tensor([[2.0, 1.0, 0.5, 0.0, -1.0, -2.0]], dtype=torch.float64)
    n, expected = 100_000, logits.softmax(-1)[0]
    indices, y, _ = st.soft_token(logits.expand(n, -1), mode, 1.0, top_p=1.0, min_p=0.0, tau=tau,
                                  generator=gen(1))
    counts = torch.bincount(st.likeliest(indices, y), minlength=6)
    squares = (counts - n * expected) ** 2 / (n * expected)
    assert squares.sum() < 25.7                                     # 5 degrees of freedom
    assert ((counts - n / 6) ** 2 / (n / 6)).sum() > 1000           # and it is not uniform


@pytest.mark.parametrize("gamma", [0.05, 1.0, 4.0, 100.0])
def test_dirichlet_moments(gamma):
    """Mean p and variance p (1 - p) / (gamma + 1), within five standard errors, also where gamma p
    is tiny."""
    p, n = torch.tensor([0.6, 0.25, 0.1, 0.04, 0.01]), 100_000
    indices, y, _ = st.soft_token(p.log().expand(n, -1), "dirichlet", 1.0, top_p=1.0, min_p=0.0,
                                  gamma=gamma, generator=gen(2))
    y = dense(indices, y, 5).double()
    assert torch.isfinite(y).all() and (y >= 0).all()
    assert torch.allclose(y.sum(1), torch.ones(n, dtype=y.dtype), atol=1e-5)
    variance = p * (1 - p) / (gamma + 1)
    assert ((y.mean(0) - p).abs() < 5 * (variance / n).sqrt()).all()
    error = ((y - p) ** 2).var(0).div(n).sqrt()
    assert (((y - p) ** 2).mean(0) - variance).abs().le(5 * error).all()


@pytest.mark.parametrize("alpha", [1e-4, 0.01, 0.3, 1.0, 7.0, 400.0])
def test_log_gamma(alpha):
    """ln Gamma(alpha) has mean digamma(alpha) and variance trigamma(alpha)."""
    n = 100_000
    noise = sampling.draw_noise("dirichlet", (n,), gen(3))
    x = sampling.log_gamma(torch.full((n,), alpha), noise).double()
    a = torch.tensor(alpha, dtype=torch.float64)
    mean, variance = torch.digamma(a), torch.polygamma(1, a)
    assert abs(x.mean() - mean) < 5 * (variance / n).sqrt()
    assert abs(x.var() / variance - 1) < 0.05
    none = sampling.log_gamma(torch.zeros(1), sampling.draw_noise("dirichlet", (1,), gen()))
    assert none.item() == -math.inf


def test_limits():
    """tau -> 0 is sampling with the same noise, large gamma and no noise are vanilla, top-k 1 is
    greedy, exactly or in the limit."""
    logits = some_logits(200)

    def token(mode, **changed):
        return dense(*st.soft_token(logits, mode, **changed)[:2], 40)

    noise = sampling.draw_noise("gumbel", (200, 30), gen()).double()
    sampled = token("sample", noise=noise)
    assert torch.equal(token("gumbel", tau=1e-12, noise=noise), sampled)
    greedy = token("greedy")
    assert torch.equal(greedy.argmax(1), logits.argmax(1)) and not torch.equal(greedy, sampled)
    vanilla = token("vanilla", max_topk=15)
    assert torch.allclose(token("dirichlet", gamma=1e9, generator=gen()), vanilla, atol=1e-3)
    assert torch.allclose(token("gumbel", tau=1.0, noise=0 * noise), vanilla)
    for mode in st.MODES:
        assert torch.equal(token(mode, top_k=1, generator=gen()), greedy)


@pytest.mark.parametrize("mode", st.MODES)
def test_a_row_does_not_depend_on_its_batch(mode):
    """With given noise; and a generator gives the noise that draw_noise gives from it."""
    logits = some_logits(7).float()
    noise = sampling.draw_noise(mode, (7, 30), gen())
    whole = st.soft_token(logits, mode, noise=noise)
    for b in range(7):
        single = st.soft_token(logits[b:b + 1], mode, noise=noise[b:b + 1])
        assert all(torch.allclose(a[0], w[b], atol=1e-6) for a, w in zip(single, whole))
    drawn = st.soft_token(logits, mode, generator=gen())
    assert all(torch.equal(a, w) for a, w in zip(drawn, whole))


# ---------------------------------------------------------------- the log-density

def logistic_grid(K, reach, n=401):
    """Points y (.., K) of the simplex as softmax of a grid z, and the volume that belongs to each,
    |dy / dz| dz = prod y dz."""
    z = torch.linspace(-reach, reach, n, dtype=torch.float64)
    last = torch.zeros((n,) * (K - 1), dtype=torch.float64)
    z = torch.stack([*torch.meshgrid(*[z] * (K - 1), indexing="ij"), last], -1)
    cell = (2 * reach / (n - 1)) ** (K - 1)
    return z.softmax(-1), z.log_softmax(-1).sum(-1).exp() * cell


@pytest.mark.parametrize("tau", [0.5, 1.0, 1.5])
@pytest.mark.parametrize("p", [[0.7, 0.3], [0.5, 0.3, 0.2], [0.9, 0.06, 0.04]], ids=str)
def test_log_density_integrates_to_one(p, tau):
    """Over the simplex, in one and in two dimensions; and the part where y_i is largest has
    probability p_i."""
    p = torch.tensor(p, dtype=torch.float64)
    y, volume = logistic_grid(len(p), 15 / tau)
    mass = sampling.gumbel_log_density(y.log(), p.log().expand_as(y), tau).exp() * volume
    assert mass.sum().item() == pytest.approx(1, abs=1e-3)
    for i in range(len(p)):
        assert mass[y.argmax(-1) == i].sum().item() == pytest.approx(p[i].item(), abs=0.02)


def test_log_density_of_filtered_tokens():
    """A token that was filtered away, p = 0 and y = 0, is no dimension; samples of soft_token have
    a density."""
    y, p = torch.tensor([[0.6, 0.4, 0.0]]), torch.tensor([[0.8, 0.2, 0.0]])

    def density(y, p, tau):
        return sampling.gumbel_log_density(y.log(), p.log(), tau)

    assert torch.allclose(density(y, p, 0.5), density(y[:, :2], p[:, :2], 0.5))
    logits = some_logits().float()
    _, y, _ = st.soft_token(logits, "gumbel", tau=1.0, generator=gen())
    _, p, _ = st.soft_token(logits, "vanilla", max_topk=15)
    assert torch.isfinite(density(y, p, 1.0)).all()


# ---------------------------------------------------------------- small functions

@pytest.mark.parametrize("a, b, expected", [
    ("a b c d", "a b c d", 1), ("a b c d", "e f", 0), ("a b c d", "a c d", 2 * 3 / 7),
    ("police killed the gunman", "police kill the gunman", 3 / 4),
    ("police killed the gunman", "the gunman kill police", 2 / 4),
    ("a a", "a", 2 / 3), ("", "a", 0), ("", "", 1), ("b a", "a b", 1 / 2)])
def test_rouge_l(a, b, expected):
    a, b = a.split(), b.split()
    assert sampling.rouge_l(a, b) == pytest.approx(expected) == sampling.rouge_l(b, a)


def test_js_divergence():
    """0 for equal, ln 2 for disjoint, symmetric, the mean of two Kullback-Leibler divergences
    between."""
    def kl(a, b):
        return (a * (a / b).log()).sum(-1)

    p, q = some_logits(50).softmax(-1), some_logits(50, seed=1).softmax(-1)
    m = (p + q) / 2
    js = sampling.js_divergence(p, q)
    assert torch.allclose(js, (kl(p, m) + kl(q, m)) / 2)
    assert torch.equal(js, sampling.js_divergence(q, p))
    assert (js > 0).all() and (js < math.log(2)).all()
    assert not sampling.js_divergence(p, p).any()
    disjoint = torch.tensor([0.5, 0.5, 0, 0]), torch.tensor([0, 0, 0.1, 0.9])
    assert sampling.js_divergence(*disjoint).item() == pytest.approx(math.log(2))


@pytest.mark.parametrize("n, right", [(1, 0), (1, 1), (6, 0), (6, 1), (6, 3), (6, 6)])
def test_pass_at(n, right):
    """The share of all k-subsets of n rollouts in which one is right."""
    for k in range(1, n + 1):
        subsets = [any(i < right for i in chosen) for chosen in itertools.combinations(range(n), k)]
        assert sampling.pass_at(k, n, right) == pytest.approx(sum(subsets) / len(subsets))


def test_compare(text_tok):
    """Means and deviations over draws; Pass@k from the draws; a mode without chance has its
    accuracy for every k."""
    def say(text, n=3):
        return rolls.Rollout([1] * n, text_tok.encode(text), n == 3, n == 5)

    items = [dict(answer="7"), dict(answer="8")]
    runs = dict(greedy=[[say("### 7")], [say("### 1")]],
                sample=[[say("### 7"), say("### 7", 5)], [say("### 8"), say("### 9")]])
    rows = sampling.compare(runs, items, text_tok, 2, rolls.Draft.value)
    greedy, sample = rows["greedy"], rows["sample"]
    assert greedy["accuracy"] == 50 and greedy["std"] == 0
    assert greedy["pass_at"] == {1: 50, 2: 50}
    assert sample["accuracy"] == 75 and sample["std"] == pytest.approx(50 / 2 ** 0.5)
    assert sample["pass_at"] == {1: 75, 2: 100} and sample["right"].tolist() == [[1, 1], [1, 0]]
    assert sample["steps"] == 3.5 and sample["ended"] == 75 and sample["cut"] == 25


@pytest.mark.parametrize("vanilla, gumbel, right, words", [
    (1.0, 0.5, 1.0, ("vanilla goes 0 % of that way, so it follows",
                     "gumbel goes 100 % of that way, so it escapes",
                     "gains against greedy (+100.0")),
    (0.5, 1.0, 0.0, ("vanilla goes 100 % of that way, so it escapes", "gumbel goes 0 %",
                     "neither clearly gains nor loses against greedy (+0.0")),
    (0.75, 0.75, 0.0, ("vanilla goes 50 % of that way, so it stays between",))])
def test_finding_is_said_from_the_numbers(vanilla, gumbel, right, words):
    def row(x):
        return dict(right=np.full((3, 2), x), pass_at={1: 1.0, 2: 2.0})

    rows = {mode: row(right if mode == "gumbel" else 0.0) for mode in st.MODES}
    means = dict(greedy=1, sample=0.5, vanilla=vanilla, dirichlet=0.6, gumbel=gumbel, moi=0.5)
    rouge = {mode: np.full((3, 2), x) for mode, x in means.items()}
    assert all(word in claims.finding(rows, rouge) for word in words)
    rouge["sample"][:] = 1
    assert "raise --temperature" in claims.finding(rows, rouge)


# ---------------------------------------------------------------- where thinking ends

TEXTS = ["\n".join(["so ### 7", "### Step 1", "The answer is near", "#### 3", "### 8", "### yes",
                    "The answer is: 5", "The answer is: $5"])]


@pytest.fixture(params=["numbers-apart", "gpt2", "is-a", "bytes"])
def any_tok(request):
    """Compact tokenizers, and one whose tokens are bytes, so that a prompt has many."""
    if request.param == "bytes":
        return Tokenizer.compact(TEXTS, most=0)
    return Tokenizer.compact(TEXTS, request.param)


def draft_lab(tok, prompt=COCONUT_MARK, max_think=90, max_new=90):
    """What a Draft takes from a Lab."""
    flags = SimpleNamespace(max_think=max_think, max_new=max_new)
    return SimpleNamespace(tok=tok, prompt=prompt, usual=tok.encode(prompt.strip()), flags=flags)


def written(lab, text, **more):
    """The draft of a row that would write this text and eos, and its Rollout as texts."""
    draft, ids = rolls.Draft(lab), [*lab.tok.encode(text), lab.tok.eos]
    while not draft.done:
        token = ids[min(len(draft.said), len(ids) - 1)]
        draft.go_on(token, token, **more)
    r = draft.rollout()
    return lab.tok.decode(r.trace), lab.tok.decode(r.answer), r.ended, r.cut


@pytest.mark.parametrize("prompt, steps, answer", [
    ("### ", "", "### 8"), ("### ", "2+3=5\n", "### 5"), ("### ", "2+3=5\n", "### yes"),
    ("### ", "### Step 1\n2+3=5\n### Step 2\n5+3=8\n", "### 8"), ("### ", "so ### 7\n", "### 8"),
    ("### ", "#### 3\n", "### 8"), ("### ", "\n\n", "### 8"), ("### ", "2+3=5\n", "### 5\n"),
    ("The answer is: ", "", "The answer is: 5"),
    ("The answer is: ", "The cat is 5.\nThe answer is near\n", "The answer is: $5"),
    ("The answer is: ", "so The answer is: 5\nThe answer\n", "The answer is: yes"),
    ("Answer:", "Answer\nAn answer: 4\n", "Answer:$5")])
def test_where_the_answer_begins(any_tok, prompt, steps, answer):
    """Where the whole prompt begins the last line, whatever the tokens are."""
    assert written(draft_lab(any_tok, prompt), steps + answer) == (steps, answer, True, False)


def test_where_thinking_is_ended(text_tok):
    """By eos, by Cold Stop and by the limit: the prompt is put in, and is not read as a step
    afterwards; only limits cut. An answer may be cut, too."""
    lab = draft_lab(text_tok)
    assert written(lab, "2+3=5") == ("2+3=5", "###", False, False)
    assert written(lab, "2+3=5", stop=True)[::2] == ("", False)
    n = len(text_tok.encode("2+3=5\n"))
    for text in ("2+3=5\n6+7\n8", "2+3=5\n### 5"):
        trace, answer, ended, cut = written(draft_lab(text_tok, max_think=n), text)
        assert (trace, answer[:3], ended, cut) == ("2+3=5\n", "###", False, True)
    trace, answer, ended, cut = written(draft_lab(text_tok, max_new=2), "2+3=5\n### 512")
    assert (trace, ended, cut) == ("2+3=5\n", True, True) and answer in ("### 5", "### 51")


def limits(tok, examples, **typed):
    """--max-think and --max-new of these flags and Examples."""
    flags = argparse.Namespace(**dict(max_think=None, max_new=None) | typed)
    chosen = rolls.limits(flags, examples, tok, COCONUT_MARK, [0])
    return chosen.max_think, chosen.max_new


def test_limits_cut_off_no_gold_text(text_tok, capsys):
    """By default 40 and 24, or what the longest steps with a prompt, and the longest answer or step
    that begins like one, need; what was typed stays, with a warning where it is too low."""
    def example(steps, answer):
        return Example([1], [text_tok.encode(step + "\n") for step in steps], answer)

    answer = text_tok.encode("### 5") + [text_tok.eos]
    long = [5] * 30 + [text_tok.eos]
    assert limits(text_tok, [example(["2+3"], answer)]) == (40, 24)
    assert limits(text_tok, [example(["+" * 50], answer), example([], long)]) == (52, 31)
    step = "### " + "+ " * 60
    n = len(text_tok.encode(step + "\n"))
    assert limits(text_tok, [example([step], answer)]) == (n + 1, n)
    assert not capsys.readouterr().out
    assert limits(text_tok, [example([], long)], max_new=30, max_think=1) == (1, 30)
    (line,) = capsys.readouterr().out.splitlines()
    assert "--max-new 30" in line and "31 tokens" in line
    assert limits(text_tok, [example(["2+3"], answer)], max_think=4) == (4, 24)
    assert "--max-think 4" in capsys.readouterr().out


def test_usual_prompt():
    """Of most answers, up to the token that completes it."""
    tok = Tokenizer.compact(["### 7", "### yes"])
    answers = [tok.encode(f"### {answer}") + [tok.eos] for answer in ("7", "yes", "77", "")]
    assert tok.decode(rolls.prompt_tokens(answers, tok, "### ")) == "### "
    assert tok.decode(rolls.prompt_tokens(answers[1:2], tok, "### ")) == "###"


# ---------------------------------------------------------------- the loop, on the tiny model

def settings(*argv, **changed):
    """The settings of short rollouts, some of them changed."""
    short = "--temperature 2 --max-think 9 --max-new 6 --draws 3 --batch-size 256".split()
    return argparse.Namespace(**vars(st.parse_flags([*short, *argv])) | changed)


def spelling(spelled, ends=()):
    """A tokenizer of the tiny model: token i is spelled[i], or wi; those of `ends` end a line."""
    def decode(ids):
        return "".join(spelled.get(i, f" w{i}") + "\n" * (i in ends) for i in ids)
    return SimpleNamespace(eos=62, decode=decode)


def marks(*ids, ends=range(67)):
    """What in a Lab makes each of the ids a whole answer prompt; all tokens end lines, so that
    these can be anywhere."""
    return dict(tok=spelling(dict.fromkeys(ids, "###"), set(ends) - set(ids)), usual=[ids[0]])


words = spelling({50: "###", 21: "### "}, {5, 25, 60}).decode


@pytest.fixture
def lab(model, machine):
    """The tiny model asks itself four questions; thinking ends with token 50 or 21, in the
    beginning of a line."""
    tok = SimpleNamespace(eos=62, decode=words)
    return Lab(settings(), machine, model, tok, [dict(answer="w1")] * 4, QUESTIONS, "### ", [50],
                  30)


@torch.no_grad()
def rollouts(lab, mode, *argv, **changed):
    """Rollouts of a lab, with other settings."""
    return st.rollouts(lab._replace(flags=settings(*argv, **changed)), mode)


def answer_at(lab, said):
    """Where the last line that thinking may begin begins, and whether it begins with the prompt, by
    the text."""
    starts = [j + 1 for j, token in enumerate(said[:lab.flags.max_think - 1])
              if "\n" in lab.tok.decode([token])]
    start = max(starts, default=0)
    lines = [lab.tok.decode(said[start:end + 1]) for end in range(start, len(said))]
    return start, any(line.startswith(lab.prompt) or line == lab.prompt.rstrip() for line in lines)


def plain_rollout(lab, question, mode, noise=None, answer_noise=None, said=()):
    """One rollout by its definition, trace and answer: everything read anew at each step, without
    cache, padding or batch. said: what the row has said before, read with the question."""
    model, flags, eos = lab.model, lab.flags, lab.tok.eos
    x, said, confident = model.wte(torch.tensor(question)), list(said), 0
    forced = last = None                      # where a prompt was put in; the last line with one
    while True:
        start, answers = answer_at(lab, said)
        last = start if answers else last
        start = start if forced is None else forced
        logits = model.head(model(embeds=x[None])[:, -1])
        if forced is None and not answers:
            t = len(said)
            indices, p, entropy = st.soft_token(
                logits, mode, **st.filters(flags),
                noise=None if noise is None else noise[min(t, flags.max_think - 1)])
            token = indices[0, p[0].argmax()].item()
            confident = confident + 1 if entropy < flags.cold_stop_entropy else 0
            cold = mode in st.SOFT and confident >= flags.cold_stop_steps
            if token == eos and last is not None and t < flags.max_think and not cold:
                return said[:last], said[last:]
            if t == flags.max_think or cold or token == eos:
                forced = t
                for token in lab.usual[:flags.max_new]:
                    said.append(token)
                    x = torch.cat([x, model.wte(torch.tensor([token]))])
                continue
            said.append(token)
            if answer_at(lab, said)[1]:
                indices, p = torch.tensor([[token]]), torch.ones(1, 1)
            x = torch.cat([x, (p[0, :, None] * model.wte(indices[0])).sum(0)[None]])
            continue
        confident, n = 0, len(said) - start
        token = logits.argmax().item()
        if answer_noise is not None:
            indices, p, _ = st.soft_token(
                logits, "sample", flags.answer_temperature, flags.top_k, flags.answer_top_p, 0.0,
                flags.top_k, noise=answer_noise[min(n, flags.max_new) - 1])
            token = indices[0, p[0].argmax()].item()
        if token == eos or n >= flags.max_new:
            return said[:start], said[start:]
        said.append(token)
        x = torch.cat([x, model.wte(torch.tensor([token]))])


@torch.no_grad()
@pytest.mark.parametrize("mode", st.MODES)
@pytest.mark.parametrize("prompt, usual, spelled", [
    ("### ", [7], dict.fromkeys(range(10), "###")),
    ("The answer is: ", [7, 25],
     dict.fromkeys(range(20), "The answer") | dict.fromkeys(range(20, 40), " is: "))])
def test_rollouts_are_their_definition(lab, mode, prompt, usual, spelled):
    """Batched, padded, cached, from a shared prefill: each rollout is that of a plain loop with the
    same noise. Cold Stop, the prompt and the limit end some of them; a prompt has one token or two,
    and some lines that begin with it are steps."""
    lab = lab._replace(tok=spelling(spelled, range(40, 67)), prompt=prompt, usual=usual,
                       flags=settings(cold_stop_entropy=4.13, cold_stop_steps=4))
    found = st.rollouts(lab, mode)
    certain = mode in ("greedy", "vanilla")
    assert [len(row) for row in found] == [1 if certain else 3] * 4
    for i, row in enumerate(found):
        for d, rollout in enumerate(row):
            own = gen(int(runtime.generator(lab.flags.seed, i, d).integers(2 ** 62)))
            noise = None if certain else sampling.draw_noise(mode, (9, 30), own)[:, None]
            assert rollout[:2] == plain_rollout(lab, QUESTIONS[i], mode, noise)
    flat = [r for row in found for r in row]
    assert all(lab.tok.decode(r.answer).startswith(prompt.rstrip()) for r in flat)
    if certain and prompt == "### ":               # nothing is drawn: the same in all versions
        assert {r.ended for r in flat} == {True, False}


@pytest.mark.parametrize("mode", ["vanilla", "dirichlet", "gumbel"])
def test_batch_size_changes_nothing(lab, mode):
    whole = rollouts(lab, mode)
    for size in (1, 4, 7):
        assert rollouts(lab, mode, "--batch-size", str(size)) == whole
    assert rollouts(lab, mode, "--seed", "1") != whole or mode == "vanilla"


@torch.no_grad()
@pytest.mark.parametrize("mode", NOISY)
def test_shared_prefill(lab, mode):
    """Rollouts of a repeated cache are those of as many prefills."""
    noise = sampling.draw_noise(mode, (9, 6, 30), gen())
    cache, h = st.prefill(lab, QUESTIONS[:2])
    shared = st.think_and_answer(lab, cache.repeat(3), h.repeat_interleave(3, 0), mode, noise)
    cache, h = st.prefill(lab, [q for q in QUESTIONS[:2] for _ in range(3)])
    assert st.think_and_answer(lab, cache, h, mode, noise) == shared


@pytest.mark.parametrize("marker_at", [0, 3, 8, None])
def test_greedy_is_plain_decoding(lab, marker_at):
    """Until its marker and on after it, mode greedy is model.decode, token for token; also with a
    warm answer temperature."""
    plain = lab.model.decode(*st.prefill(lab, QUESTIONS), 15, lab.tok.eos)
    for i, line in enumerate(plain):
        marker = line[marker_at] if marker_at is not None else 60
        n = line.index(marker) if marker in line else len(line)
        ours = lab._replace(**marks(marker, ends=set(line[:n]) - set(line[n:])))
        (trace, answer, ended, cut), = rollouts(ours, "greedy", "--answer-temperature", "1")[i]
        if n and line[n - 1] in line[n:]:
            continue                                 # the marker does not begin a line
        if n < 9:
            assert ended and trace == line[:n] and trace + answer == line[:n + 6]
        else:
            assert not ended and cut and trace == line[:9] and answer[0] == marker


def test_modes_agree_at_top_k_1(lab):
    """One token left: every mode thinks what greedy thinks."""
    greedy = rollouts(lab, "greedy", "--top-k", "1")
    for mode in st.MODES:
        for row, mine in zip(greedy, rollouts(lab, mode, "--top-k", "1")):
            assert all(r == row[0] for r in mine)


def test_gumbel_with_small_tau_samples(lab):
    tau = "--tau", "1e-6"
    assert rollouts(lab, "gumbel", *tau) == rollouts(lab, "sample", *tau)


@torch.no_grad()
def test_answers_with_a_temperature(lab):
    """A warm answer is drawn token by token, also after vanilla thinking; a narrow top-p makes it
    greedy again."""
    cold = [row[0].answer for row in rollouts(lab, "vanilla")]
    hot = "--answer-temperature", "2"
    warm = rollouts(lab, "vanilla", *hot)
    assert {len(row) for row in warm} == {3}
    assert len({tuple(r.answer) for row in warm for r in row}) > 4
    lab = lab._replace(flags=settings(*hot))
    for i, row in enumerate(st.rollouts(lab, "gumbel")):
        for d, rollout in enumerate(row):
            own = gen(int(runtime.generator(lab.flags.seed, i, d).integers(2 ** 62)))
            noise = [sampling.draw_noise(mode, (n, 30), own)[:, None]
                     for mode, n in (("gumbel", 9), ("sample", 6))]
            assert rollout[:2] == plain_rollout(lab, QUESTIONS[i], "gumbel", *noise)
    narrow = rollouts(lab, "vanilla", *hot, "--answer-top-p", "1e-6")
    assert [[r.answer for r in row] for row in narrow] == [[answer] * 3 for answer in cold]


@torch.no_grad()
@pytest.mark.parametrize("mode, entropies, expected", [
    ("vanilla", [0, 0, 0, 1, 1, 1, 1, 1, 1], 2), ("vanilla", [0, 0, 1, 0, 0, 1, 0, 0, 0], 8),
    ("vanilla", [1, 0, 0, 1, 0, 0, 1, 0, 0], 9), ("gumbel", [1, 1, 0, 0, 0, 0, 0, 0, 0], 4),
    ("dirichlet", [0.01] * 9, 9), ("greedy", [0] * 9, 9), ("sample", [0] * 9, 9)])
def test_cold_stop(lab, monkeypatch, mode, entropies, expected):
    """The third confident step in a row becomes the marker; an uncertain step starts the count
    again, as does an entropy at the bound; thoughts in words have no Cold Stop. Rows count for
    themselves."""
    turn, soft_token = iter([*entropies, *[1] * 9]), st.soft_token

    def scripted(logits, *args, **kwargs):
        indices, p, _ = soft_token(logits, "greedy")
        entropy = torch.full((len(logits),), float(next(turn)))
        entropy[1:] = 1.0
        return torch.where(indices >= 0, 33, 0), p, entropy

    monkeypatch.setattr(st, "soft_token", scripted)
    lab = lab._replace(flags=settings("--draws", "1", cold_stop_steps=3))
    noise = torch.zeros(9, 4, 30)
    found = st.think_and_answer(lab, *st.prefill(lab, QUESTIONS), mode, noise)
    assert [len(r.trace) for r in found] == [expected, 9, 9, 9]
    assert all(r.answer[0] == lab.usual[0] and not r.ended for r in found)


def test_eos_ends_thinking(lab):
    """A model that wants to stop is made to answer."""
    before = rollouts(lab, "greedy")[0][0].trace
    ours = lab._replace(tok=SimpleNamespace(eos=before[3], decode=words))
    (trace, answer, ended, _), = rollouts(ours, "greedy")[0]
    assert trace == before[:before.index(before[3])] and not ended and answer[0] == lab.usual[0]


def test_a_step_is_compiled_once(lab):
    """Thinking and answering, in all modes and batches of one size, run one compiled graph; reading
    the questions takes others."""
    size = "--batch-size", "6"                               # 2 questions, 3 draws each
    plain = rollouts(lab, "gumbel", *size)
    counter = CompileCounter()
    lab.model.compile(backend=counter)
    with torch.no_grad():
        for questions in (QUESTIONS[::2], QUESTIONS[1::2]):
            st.prefill(lab, questions)
    before = counter.frame_count
    assert rollouts(lab, "gumbel", *size) == plain
    rollouts(lab, "dirichlet", *size)
    assert counter.frame_count == before + 1


# ---------------------------------------------------------------- the probes, by plain loops

@pytest.fixture
def probed(lab):
    """A lab, and its rollouts by mode, as the probes are given them."""
    lab = lab._replace(flags=settings("--lag", "3", "--uncertain", "1.5", "--batch-size", "8"))
    with torch.no_grad():
        return lab, probe_soft.Runs(lab)


def thoughts(lab, runs, mode):
    """For each step of each question, by plain loops: what the rollout wrote in all, t, the
    embeddings (T, C) read before the step, its logits, its soft token, its entropy."""
    model = lab.model
    for question, (r, *_) in zip(lab.questions, runs(mode)):
        x = model.wte(torch.tensor(question))
        for t in range(len(r.trace)):
            logits = model.head(model(embeds=x[None])[:, -1])
            indices, p, _ = st.soft_token(logits, "vanilla", **st.filters(lab.flags))
            soft = st.soft_embedding(model.wte.weight, indices, p)
            entropy = torch.special.entr((logits / lab.flags.temperature).softmax(-1)).sum().item()
            yield r.trace + r.answer, t, x, logits, soft, entropy
            x = torch.cat([x, soft if mode == "vanilla" else model.wte(logits.argmax(-1))])


@torch.no_grad()
def test_probe_js(probed):
    """Means by step and over all and the uncertain steps are those of full readings of each
    sequence."""
    (lab, runs), expected = probed, []
    model = lab.model
    for line, t, x, logits, soft, entropy in thoughts(lab, runs, "vanilla"):
        top, rest = logits.topk(2).indices[0], model.wte(torch.tensor(line[t + 1:t + 3]))
        p = []
        for e in (soft, model.wte(top[:1]), model.wte(top[1:])):
            h = model(embeds=torch.cat([x, e, rest])[None])[0, len(x):]
            p.append(model.head(h).softmax(-1))
        js = [[sampling.js_divergence(a, b).item() for a, b in zip(p[0], other)]
              for other in p[1:]]
        expected.append((t + 1, entropy, js[0][0], js[1][0], max(js[0]), max(js[1])))
    first, histogram, by_lead = probe_soft.probe_js(lab, runs)
    expected = np.array(expected)
    rows = {row[0]: row[1:] for row in first["rows"]}
    step, entropy = expected.T[:2]
    for name, chosen in ((1, step == 1), (9, step == 9), ("all", step > 0),
                         ("uncertain", entropy >= 1.5)):
        means = [chosen.sum(), *expected[chosen, 1:].mean(0)]
        assert rows[name] == pytest.approx(means, abs=1e-4) and chosen.any()
    totals = [sum(row[j] for row in histogram["rows"]) for j in range(1, 7)]
    assert totals == pytest.approx([100] * 6)


@torch.no_grad()
def test_probe_lens(probed):
    """The share of the first path by layer, from full readings."""
    (lab, runs), shares, mixes = probed, [], (1.0, 0.6, 0.0)
    model = lab.model
    for line, t, x, logits, _, entropy in thoughts(lab, runs, "greedy"):
        if entropy < lab.flags.uncertain:
            continue
        e = model.wte(logits.topk(2).indices[0])
        rest = model.wte(torch.tensor(line[t + 1:t + 3]))
        states = []
        for w in mixes:
            mix = (w * e[0] + (1 - w) * e[1])[None]
            states.append(model(embeds=torch.cat([x, mix, rest])[None], all_states=True))
        said = [model.head(s[-1][0, len(x):]).argmax(-1).tolist() for s in (states[0], states[-1])]
        at = next((j for j, (a, b) in enumerate(zip(*said)) if a != b), None)
        if at is None:
            continue
        paths, p = [s[at] for s in said], []
        for of_mix in states:
            read = [s[0, len(x) + at] for s in of_mix]
            read[:-1] = map(model.ln_f, read[:-1])
            p.append(torch.stack([model.head(s).softmax(-1)[paths] for s in read]))
        p = torch.stack(p)
        shares.append(p[..., 0] / p.sum(-1))
    got, visible = probe_soft.probe_lens(lab, runs, mixes)
    assert len(shares) > 5 and f"at {len(shares)} forks" in got["title"]
    assert [float(row[0]) for row in got["rows"]] == list(mixes)
    for row, expected in zip(got["rows"], torch.stack(shares).mean(0).tolist()):
        assert row[1:-1] == pytest.approx(expected, abs=1e-4) and 0 < row[-1] <= 1
    assert got["rows"][0][-2] > 0.5 > got["rows"][-1][-2]


@torch.no_grad()
def test_probe_branching(probed):
    """Each fork, continued by plain decoding of question, greedy trace and candidate."""
    (lab, runs), expected = probed, []
    flags, lengths = lab.flags, [len(q) for q in lab.questions]
    for line, t, x, logits, soft, entropy in thoughts(lab, runs, "greedy"):
        if entropy < flags.uncertain or t + 1 == flags.max_think:
            continue
        top = logits.topk(2).indices[0].tolist()
        question = lab.questions[lengths.index(len(x) - t)]
        left = argparse.Namespace(**vars(flags) | dict(max_think=flags.max_think - t - 1))
        rest = []
        for token in top:
            begun = question + line[:t] + [token]
            trace, answer = plain_rollout(lab._replace(flags=left), begun, "greedy")
            rest.append(trace + answer)
        p = logits.softmax(-1)[0, top]
        expected.append((t + 1, 100 * (p[1] / p.sum()).item(), rest[0] != rest[1]))
        # the first candidate is the greedy thought itself
        assert rest[0][:len(line) - t - 1] == line[t + 1:]
    (got,) = probe_soft.probe_branching(lab, runs)
    expected, rows = np.array(expected), {row[0]: row[1:] for row in got["rows"]}
    means = [len(expected), expected[:, 1].mean(), 100 * expected[:, 2].mean()]
    assert rows["all"][:3] == pytest.approx(means, abs=1e-3)
    for t in set(expected[:, 0]):
        assert rows[int(t)][0] == (expected[:, 0] == t).sum()
    # the soft token takes the first one's path more often
    assert rows["all"][7] > rows["all"][8]


@torch.no_grad()
def test_branching_counts_right_answers_and_paths(probed, monkeypatch):
    """Of three given continuations: whose answer is right, and whose path the soft token takes."""
    def say(said, *ids):
        return rolls.Rollout([*said, *ids], [50, ids[-1]], True)

    def scripted(lab, cache, h, mode, said):
        assert len(said) == len(h)
        going_on = itertools.cycle([(4, 8, 1), (4, 9, 2), (4, 9, 1)])
        return [say(one, *ids) for one, ids in zip(said, going_on)]

    monkeypatch.setattr(probe_soft, "think_and_answer", scripted)
    (got,) = probe_soft.probe_branching(*probed)
    for row in got["rows"]:
        assert row[3:] == [100, 100, 100, 0, 100, 0, 100]


@torch.no_grad()
def test_probe_randomness(probed):
    """Vanilla has no randomness, sampling no softness; both noises tend to vanilla or to sampling
    at their ends."""
    lab, runs = probed
    lab.flags.top_k = lab.flags.max_topk = 15
    (got,) = probe_soft.probe_randomness(lab, runs)
    rows = {name: (random, soft) for name, random, soft in got["rows"]}
    assert rows["vanilla"][0] == 0 and rows["sample"][1] == 0
    assert rows["vanilla"][1] > 0.5 and rows["sample"][0] > 0.2
    assert rows["dirichlet gamma 256"] == pytest.approx(rows["vanilla"], abs=0.05)
    assert rows["gumbel tau 0.05"] == pytest.approx(rows["sample"], abs=0.1)
    randomness = [rows[f"dirichlet gamma {g}"][0] for g in (0.25, 1, 4, 16, 64)]
    assert randomness == sorted(randomness, reverse=True)
    assert all(0 <= r <= math.log(2) for r, _ in rows.values())


@torch.no_grad()
def test_probe_rouge(probed):
    lab, runs = probed
    (got,) = probe_soft.probe_rouge(lab, runs)
    rows = {name: rest for name, *rest in got["rows"]}
    assert rows["greedy"] == [1, 0, 100] and set(rows) == set(st.MODES) and rows["sample"][0] < 1
    values = []
    for row, (greedy,) in zip(runs("gumbel"), runs("greedy")):
        own = words(greedy.trace).split()
        values += [sampling.rouge_l(words(r.trace).split(), own) for r in row]
    assert rows["gumbel"][0] == pytest.approx(np.mean(values))


@torch.no_grad()
def test_probes_where_nothing_is_uncertain(probed, capsys):
    """Or where every thought ends at once: tables without rows, and a hint."""
    lab, runs = probed
    lab.flags.uncertain = 99.0
    for name in ("lens", "randomness", "branching"):
        got = probe_soft.PROBES[name](lab, runs)[0]
        sheets.show(got, probe_soft.EMPTY)
        assert got["rows"] == [] and "--uncertain" in capsys.readouterr().out
    assert probe_soft.probe_js(lab, runs)[0]["rows"][-1][1:] == [0] + [None] * 5
    ended = lab._replace(**marks(*range(67)))
    runs = probe_soft.Runs(ended)
    assert probe_soft.probe_js(ended, runs)[0]["rows"][0][:2] == ["all", 0]
    assert probe_soft.probe_randomness(ended, runs)[0]["rows"] == []


@torch.no_grad()
def test_a_thought_as_text(probed):
    """Every token with a weight from 1 % on, a mixture in brackets."""
    lab, runs = probed
    lab = lab._replace(questions=QUESTIONS[:1],
                       tok=SimpleNamespace(eos=62, decode=lambda ids: f" w{ids[0]}"))
    text, steps = probe_soft.as_text(lab, "vanilla"), []
    for _, _, _, logits, *_ in thoughts(lab, runs, "vanilla"):
        steps.append(st.soft_token(logits, "vanilla", **st.filters(lab.flags))[:2])
    assert text.count("[") == sum(((p >= 0.01).sum() > 1).item() for _, p in steps) > 3
    indices, p = steps[0]
    assert text.startswith(f"[ w{indices[0, 0]} {100 * p[0, 0]:.0f} %")


# ---------------------------------------------------------------- whole runs

SMALL = ("--n 3 --draws 2 --max-think 6 --max-new 4 --uncertain 0.5 --device cpu "
         "--dtype float32").split()
TRAINING = ["--updates", "3", *SMALL]            # without --model
TABLES = ["modes", "js", "js-histogram", "js-lead", "lens", "lens-visible", "rouge", "randomness",
          "branching"]
FIGURES = TABLES[:1] + TABLES[2:]


def run(argv, main=functools.partial(st.main, probe_soft)):
    """`python soft_thinking.py ARGV` in this process; returns the exit code."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(sys, "argv", ["soft_thinking.py", *map(str, argv)])
        runtime.run_main(main)
    return stop.value.code or 0


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("soft") / "mini"
    data_prep.write_dataset(folder, prosqa_mini((64, 4, 6)))
    return folder


def script(path, *argv):
    """`python PATH ARGV`, but in this process, which has torch already: exit code and stdout."""
    printed = io.StringIO()
    with (pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stop,
          contextlib.redirect_stdout(printed)):
        patch.setattr(sys, "argv", [str(path), *map(str, argv)])
        runpy.run_path(str(path), run_name="__main__")
    return SimpleNamespace(returncode=stop.value.code or 0, stdout=printed.getvalue())


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    """The folder of a first run with the small model trained in it, and what was printed; only the
    data is given. (coconut.py as a process of its own: see test_data_that_does_not_fit.)"""
    out = tmp_path_factory.mktemp("run") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(subprocess, "run", lambda command, stdout: script(*command[1:]))
        done = script(ROOT / "soft_thinking.py", "--data", data, "--out", out, *TRAINING)
    assert done.returncode == 0
    return out, done.stdout


def test_a_run_from_nothing(trained):
    """Trains, prints the table, all probes and the finding, and writes each table as JSON."""
    out, text = trained
    files = {path.name for path in out.iterdir()}
    assert files == {*(f"{name}.json" for name in TABLES), *(f"{name}.svg" for name in FIGURES),
                     "cot.pt"}
    modes = json.loads((out / "modes.json").read_text())
    assert [row[0] for row in modes["rows"]] == list(st.MODES)
    assert [row[3] for row in modes["rows"]] == [1, 2, 1, 2, 2, 2]
    assert modes["columns"][-2:] == ["Pass@1", "Pass@2"]
    assert modes["n"] == 3 and modes["flags"]["draws"] == 2
    assert modes["finding"] and modes["finding"] in text
    assert "test question 1" in text and "vanilla thinks" in text
    for name in TABLES:
        t = json.loads((out / f"{name}.json").read_text())
        assert t["title"] in text and all(len(row) == len(t["columns"]) for row in t["rows"])


def test_the_second_start_loads_the_model(trained, data, capsys):
    """Nothing is trained again; one probe or one mode is one table."""
    out, _ = trained
    before = (out / "cot.pt").stat().st_mtime_ns
    for argv in (["--probe", "randomness"], ["--mode", "dirichlet"]):
        assert run(["--data", data, "--out", out, *TRAINING, *argv]) == 0
        text = capsys.readouterr().out
        assert argv[1] in text
        for word in ("training a small one", "Finding", "logit lens"):
            assert word not in text
    assert "randomness and" not in text and (out / "cot.pt").stat().st_mtime_ns == before


def test_the_model_is_coconuts(trained, data, tmp_path, capsys):
    """What is trained is what coconut.py --method cot trains with the same settings, and coconut.py
    evaluates its checkpoint as greedy thinking."""
    out, _ = trained
    argv = ("--recipe prosqa-mini --method cot --stage-max 0 --steps-last 3 --warmup 20 "
            "--device cpu --dtype float32").split()
    assert run_coconut([*argv, "--data", data, "--out", tmp_path / "cot"]) == 0
    paths = out / "cot.pt", tmp_path / "cot" / "last.pt"
    ours, theirs = (load_checkpoint(path) for path in paths)
    assert ours["tokenizer"] == theirs["tokenizer"] and ours["config"] == theirs["config"]
    for name, value in theirs["model"].items():
        assert torch.allclose(ours["model"][name], value, atol=1e-5)
    capsys.readouterr()
    assert run_coconut(["--eval-only", out / "cot.pt", "--device", "cpu"]) == 0
    assert "cot on" in capsys.readouterr().out


LEARN = ("--method cot --n-layer 1 --n-head 2 --n-embd 32 --batch-size 8 --lr 1e-2 --device cpu "
         "--dtype float32").split()


@pytest.mark.parametrize("step, answers, tokenizer", [
    ("### Step 1", ("1", "2"), "compact"), ("### Step 1", ("1", "2"), "compact-gpt2"),
    ("### Step", ("one", "two"), "compact"), ("so ### 7", ("1", "2"), "compact")])
def test_steps_that_look_like_the_answer(tmp_path, step, answers, tokenizer):
    """Steps that begin with the prompt, or have it inside: the model of coconut.py thinks all of
    them in every mode, and answers as there."""
    write_lengths(tmp_path / "lengths", step, answers)
    argv = [*LEARN, "--stage-max", "0", "--steps-last", "100", "--tokenizer", tokenizer]
    assert run_coconut([*argv, "--data", tmp_path / "lengths", "--out", tmp_path / "cot"]) == 0
    final = json.loads((tmp_path / "cot" / "metrics.jsonl").read_text().splitlines()[-1])
    assert final["test_accuracy"] == 1
    check_thinks_the_steps(tmp_path, tmp_path / "cot" / "best.pt")


def test_steps_that_begin_as_codis_prompt(tmp_path):
    """A model of codi.py does not stop at "The", nor at "The answer is" without the colon."""
    write_lengths(tmp_path / "lengths", "The answer is near")
    argv = [*LEARN, "--steps", "100", "--tokenizer", "compact", "--out", tmp_path / "cot"]
    assert run([*argv, "--data", tmp_path / "lengths"], codi.main) == 0
    check_thinks_the_steps(tmp_path, tmp_path / "cot" / "best.pt")


def check_thinks_the_steps(folder, path):
    """All modes think exactly the gold steps, end by themselves and are right; nothing is cut."""
    assert run(["--model", path, "--draws", "2", "--probe", "none", "--out", folder / "soft"]) == 0
    items = data_prep.load(str(folder / "lengths"), need=("test",))["test"]
    tok = Tokenizer.from_state(load_checkpoint(path)["tokenizer"])
    steps = np.mean([sum(len(tok.encode(step + "\n")) for step in item["steps"])
                     for item in items])
    for row in json.loads((folder / "soft" / "modes.json").read_text())["rows"]:
        assert row[1] == 100 and row[4] == pytest.approx(steps) and row[5:7] == [100, 0]


def test_a_trained_model_ends_its_thinking(tmp_path, capsys):
    """Problems of one and of two steps, learned by coconut.py: mode greedy has its accuracy, thinks
    as long as the steps are and ends by itself; Cold Stop after two confident steps cuts soft
    thinking, not words."""
    write_lengths(tmp_path / "lengths", "x")
    argv = [*LEARN, *"--stage-max 0 --steps-last 100 --max-new 8".split()]
    assert run_coconut([*argv, "--data", tmp_path / "lengths", "--out", tmp_path / "cot"]) == 0
    final = json.loads((tmp_path / "cot" / "metrics.jsonl").read_text().splitlines()[-1])
    assert final["test_accuracy"] == 1

    def modes(*more):
        assert run(["--model", tmp_path / "cot" / "best.pt", "--draws", "2", "--probe", "none",
                    "--out", tmp_path / "soft", *more]) == 0
        rows = json.loads((tmp_path / "soft" / "modes.json").read_text())["rows"]
        return {row[0]: row for row in rows}

    steps = final["tokens"] - 2                              # "### " and the number are the answer
    for row in modes().values():
        assert row[1] == 100 and row[4] == steps > 1 and row[5] == 100
    assert "sampling never left the greedy trace" in capsys.readouterr().out
    rows = modes("--cold-stop-entropy", "1", "--cold-stop-steps", "2")
    assert [row[4] for row in rows.values()] == [steps, steps, 1, 1, 1, 1]
    assert rows["sample"][5] == 100 > rows["vanilla"][5]


def test_released_weights(data, tmp_path, gpt2_tokenizer, capsys):
    """--model with a pytorch_model.bin thinks with the gpt2 tokenizer; weights of another
    vocabulary are refused."""
    argv = ["--model", tmp_path / "w.bin", "--data", data, "--out", tmp_path / "out", *SMALL]
    torch.save(weights(vocab_size=258, n_positions=800, n_layer=1), tmp_path / "w.bin")
    assert run(argv) == 0
    assert "ROUGE-L" in capsys.readouterr().out
    torch.save(weights(vocab_size=90, n_layer=1), tmp_path / "w.bin")
    assert run(argv) == 2
    assert "w.bin" in capsys.readouterr().err


def check_refusal(argv, capsys, *words):
    """Exit code 2 and one sentence on stderr that has the words; a traceback would fail the
    call."""
    capsys.readouterr()
    assert run(argv) == 2
    lines = capsys.readouterr().err.splitlines()
    error = [line for line in lines if line.startswith("soft_thinking.py: ")]
    assert len(error) == 1 and all(str(word) in error[0] for word in words), error


@pytest.mark.parametrize("argv, words", [
    ("--model nowhere.pt", ("nowhere.pt",)), ("--model nowhere.bin", ("nowhere.bin",)),
    ("--data /no/where", ("/no/where",)),
    ("--data {data} --out {out} --updates 4", ("cot.pt", "--out")),
    ("--data {data} --out {out} --seed 1", ("cot.pt",)),
    ("--model {out}/cot.pt --max-think 240", ("--max-think 240", "256")),
    ("--model {out}/modes.json", ("modes.json",)),
    ("--model {out}/cot.pt --device tpu9", ("tpu9",)),
    ("--model {out}/cot.pt --out {out}/modes.json", ("modes.json",))])
def test_refusals(trained, data, tmp_path, monkeypatch, gpt2_tokenizer, capsys, argv, words):
    monkeypatch.chdir(tmp_path)
    argv = [word.format(out=trained[0], data=data) for word in argv.split()]
    small = SMALL if "--model" in argv else TRAINING
    check_refusal([*small, *argv], capsys, *words)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["garbage", "no-cot"])
def test_models_that_do_not_fit(trained, data, tmp_path, capsys, kind):
    path, out = tmp_path / "m.pt", tmp_path / "out"
    if kind == "garbage":
        path.write_bytes(bytes(range(256)) * 9)
    else:
        state = load_checkpoint(trained[0] / "cot.pt")
        other = state["flags"] | dict(method="no-cot")
        runtime.save_checkpoint(path, state | dict(flags=other))
    word = "m.pt" if kind == "garbage" else "--method no-cot"
    check_refusal(["--model", path, "--data", data, "--out", out, *SMALL], capsys, word)
    assert not (out / "cot.pt").exists()


def test_data_that_does_not_fit(tmp_path, capfd):
    """An item that is longer than the model trained here: coconut.py, a process of its own, says
    so, then soft_thinking.py what to do; nothing half-made is left."""
    splits, out = chains((2, 2, 2)), tmp_path / "out"
    splits["train"][0]["question"] += " pens" * 300
    data_prep.write_dataset(tmp_path / "long", splits)
    assert run(["--data", tmp_path / "long", "--out", out, *TRAINING]) == 2
    lines = capfd.readouterr().err.splitlines()
    (theirs,) = [line for line in lines if line.startswith("coconut.py: ")]
    (ours,) = [line for line in lines if line.startswith("soft_thinking.py: ")]
    assert "256" in theirs and "item 1" in theirs and "--model" in ours
    assert not list(out.iterdir())


@pytest.mark.parametrize("argv, word", [
    ("--mode magic", "--mode"), ("--probe magic", "--probe"),
    ("--mode none --probe none", "--mode none"), ("--tau 0", "--tau"), ("--top-p 2", "--top-p"),
    ("--top-k 0", "--top-k"), ("--gamma -1", "--gamma"), ("--temperature 0", "--temperature"),
    ("--draws 0", "--draws"), ("--min-p x", "--min-p"),
    ("--cold-stop-steps 0", "--cold-stop-steps"), ("--temperature nan", "--temperature"),
    ("--answer-temperature 1e-30", "--answer-temperature"),
    ("--answer-temperature x", "--answer-t")])
def test_bad_flags(argv, word, capsys):
    with pytest.raises(SystemExit) as stop:
        st.parse_flags(argv.split())
    assert stop.value.code == 2 and word in capsys.readouterr().err


@pytest.mark.parametrize("argv, mode, probe", [
    ("", "all", "all"), ("--probe js", "none", "js"), ("--probe all", "none", "all"),
    ("--probe none", "all", "none"), ("--mode gumbel", "gumbel", "none"),
    ("--mode none", "none", "all"), ("--mode all --probe js", "all", "js")])
def test_what_is_run(argv, mode, probe):
    flags = st.parse_flags(argv.split())
    assert (flags.mode, flags.probe) == (mode, probe)


def test_every_probe_has_its_function():
    assert tuple(probe_soft.PROBES) == st.PROBES


def test_interrupted(trained, capsys, monkeypatch):
    def stop(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(probe_soft, "rollouts", stop)
    out, _ = trained
    argv = ["--model", out / "cot.pt", *SMALL, "--out", out, "--mode", "greedy"]
    assert run(argv) == 130
    assert "stopped" in capsys.readouterr().out
