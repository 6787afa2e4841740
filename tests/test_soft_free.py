"""Soft Thinking of models that follow instructions, Mixture of Inputs, and what is claimed of the
numbers."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import data_prep
import probe_soft
import soft_thinking as st
from common import claims, probe_sheets, rollouts, sheets
from common.lab import FREE, PUT_IN, Lab
from common.puzzles import chains
from common.text import Tokenizer
from llamas import tiny_llama, write_folder
from test_soft_thinking import QUESTIONS, check_refusal, run, settings, spelling

# ---------------------------------------------------------------- Mixture of Inputs


@pytest.mark.parametrize("p, drawn, beta, expected", [
    # H = 1.5 bits / log2(3) = 0.94640; w = (H p + (beta + 1 - H) y) / (beta + 1)
    ((0.5, 0.25, 0.25), 1, 1.0, (0.23660, 0.64510, 0.11830)),
    ((0.5, 0.25, 0.25), 0, 0.0, (0.52680, 0.23660, 0.23660)),
    # H = 1: with beta 0 it is the soft token itself, with beta 1 half of it
    ((1 / 3, 1 / 3, 1 / 3), 2, 0.0, (1 / 3, 1 / 3, 1 / 3)),
    ((1 / 3, 1 / 3, 1 / 3), 2, 1.0, (1 / 6, 1 / 6, 2 / 3)),
    # H = 0.27475 bits / log2(3) = 0.17335: a certain p is nearly the drawn token
    ((0.96, 0.03, 0.01), 0, 1.0, (0.99653, 0.00260, 0.00087))])
def test_mixture_of_inputs(p, drawn, beta, expected):
    noise = torch.zeros(1, 3)
    noise[0, drawn] = 20.0
    indices, w, _ = st.soft_token(torch.tensor([p]).log(), "moi", 1.0, top_p=1.0, min_p=0.0,
                                  moi_beta=beta, noise=noise)
    w = torch.zeros(1, 3).scatter_(1, indices, w)
    order = torch.tensor([p]).sort(descending=True, stable=True).indices
    assert order.tolist() == [[0, 1, 2]] and indices.tolist() == [[0, 1, 2]]
    assert w[0].tolist() == pytest.approx(expected, abs=1e-5)


def test_mixture_of_inputs_looks_at_20_tokens():
    """30 tokens alike: the first 20 are mixed, with an entropy that is the largest possible."""
    _, w, _ = st.soft_token(torch.zeros(1, 30), "moi", top_p=1.0, moi_beta=0.0)
    assert w.shape == (1, 20) and torch.allclose(w, torch.full((1, 20), 0.05))
    noise = torch.zeros(1, 30)
    _, w, _ = st.soft_token(torch.zeros(1, 30), "moi", top_p=1.0, moi_beta=1e9, noise=noise)
    assert w.max().item() == pytest.approx(1)


# ---------------------------------------------------------------- where free thinking ends

TEXT = "so 4 + 5 = 9.\nTherefore the final answer is:\n9 apples.\nThe answer is near"


@pytest.fixture(scope="module", params=[50000, 0], ids=["words", "bytes"])
def tok(request):
    return Tokenizer.compact([TEXT], most=request.param)


def written(tok, text, max_think=90, max_new=90, **more):
    """What a model says that would write this text and eos: thinking, answer, ended, cut, value."""
    flags = SimpleNamespace(max_think=max_think, max_new=max_new)
    lab = SimpleNamespace(tok=tok, prompt=PUT_IN, usual=tok.encode(PUT_IN), flags=flags)
    draft, ids = rollouts.FreeDraft(lab), [*tok.encode(text), tok.eos]
    while not draft.done:
        token = ids[min(len(draft.said), len(ids) - 1)]
        draft.go_on(token, token, **more)
    r = draft.rollout()
    return (tok.decode(r.trace), tok.decode(r.answer), r.ended, r.cut,
            rollouts.FreeDraft.value(tok, r))


@pytest.mark.parametrize("text, thinking, answer, value", [
    ("4 + 5 = 9.\nThe answer is 9.", "4 + 5 = 9.\n", "The answer is 9.", "9"),
    ("4. Therefore the final answer is:\n$9 apples.\nNow 7", "4. Therefore ",
     "the final answer is:\n$9 apples.\n", "9"),
    ("that makes 4 + 5 = 9 apples.", "that makes 4 + 5 = 9 apples.", "", "9"),
    ("the answers are 4, then the answer is five", "the answers are 4, then ",
     "the answer is five", "4"),
    ("none", "none", "", "")])
def test_a_free_thought_ends(tok, text, thinking, answer, value):
    """At a phrase, with the end of the line that has its number; or at eos."""
    said = written(tok, text)
    assert said[0].strip() == thinking.strip() and said[1].strip() == answer.strip()
    assert said[2:] == (True, False, value)


def test_a_free_thought_is_ended(tok):
    """By the limit and by Cold Stop, with the prompt; so is one that says nothing at all."""
    n = len(tok.encode("4 + 5"))
    trace, answer, ended, cut, _ = written(tok, "4 + 5 = 9. That is it.", max_think=n)
    assert trace == "4 + 5" and answer.startswith(PUT_IN) and not ended and cut
    assert written(tok, "4 + 5", stop=True)[:4] == ("", PUT_IN, False, False)
    assert written(tok, "")[:4] == ("", PUT_IN, False, False)
    n = len(tok.encode("The answer is 9"))
    *_, ended, cut, value = written(tok, "The answer is 9 or so, I think", max_new=n)
    assert ended and cut and value == "9"


# ---------------------------------------------------------------- the loop


@pytest.fixture(params=["gpt2", "llama"])
def lab(request, model, machine):
    """A tiny model that asks itself four questions; some tokens spell the phrase, or end it."""
    if request.param == "llama":
        model = tiny_llama()
    said = dict.fromkeys(range(0, 67, 9), "The answer is") | {62: ""}
    return Lab(settings(uncertain=1.5, forks=7), machine, model, spelling(said, range(3, 67, 5)),
               [dict(answer="1")] * 4, QUESTIONS, PUT_IN, [9], 30, rollouts.FreeDraft)


@torch.no_grad()
@pytest.mark.parametrize("mode", st.MODES)
def test_one_by_one(lab, mode):
    """A free rollout does not depend on its batch."""
    whole = st.rollouts(lab, mode)
    lab.flags.batch_size = 1
    assert st.rollouts(lab, mode) == whole
    assert {r.ended for row in whole for r in row} == {True, False} or mode in ("greedy", "vanilla")


@torch.no_grad()
def test_greedy_is_plain_decoding(lab):
    """Until the thought ends."""
    plain = lab.model.decode(*st.prefill(lab, QUESTIONS), 9, lab.tok.eos)
    for line, (r,) in zip(plain, st.rollouts(lab, "greedy")):
        n = min([i for i, token in enumerate(line) if token % 9 == 0], default=9)
        assert r.trace == line[:n] and r.ended == (n < 9)


@torch.no_grad()
def test_probes_of_a_free_model(lab):
    """All of them give numbers and verdicts; no more forks than --forks."""
    runs, found = probe_soft.Runs(lab), []
    for probe in probe_soft.PROBES.values():
        found += probe(lab, runs)
    names = [sheet["name"] for sheet in found]
    assert names == ["js", "js-histogram", "js-lead", "lens", "lens-visible", "rouge", "randomness",
                     "branching"]
    table = dict(zip(names, found))
    assert [row[0] for row in table["js"]["rows"]] == ["uncertain"]
    assert [row[0] for row in table["branching"]["rows"]] == ["all"]
    assert 0 < table["branching"]["rows"][0][1] <= 7
    assert sum(row[1] for row in table["js-lead"]["rows"]) == table["js"]["rows"][0][1]
    said = [verdict for sheet in found for _, _, verdict in sheet["claims"]]
    assert len(said) >= 6 and set(said) <= {"holds", "in part", "unclear", "does not hold"}


# ---------------------------------------------------------------- claims


def test_clustered():
    """Steps that repeat their question's value tell no more than the questions do; a step of its
    own question is one of many."""
    values, names = np.array([1.0, 3.0, 8.0]), np.array([5, 7, 9])
    mean, error = claims.clustered(values, names)
    assert mean == 4 and error == pytest.approx(values.std(ddof=1) / 3 ** 0.5)
    assert claims.clustered(values.repeat(10), names.repeat(10)) == pytest.approx((mean, error))
    assert math.isnan(claims.clustered([1.0, 2.0], [3, 3])[1])


@pytest.mark.parametrize("mean, error, also, said", [
    (1.0, 0.4, True, "holds"), (1.0, 0.4, False, "in part"), (1.0, 0.6, True, "unclear"),
    (-1.0, 0.4, True, "does not hold"), (1.0, math.nan, True, "unclear"), (0, 0, True, "unclear")])
def test_verdict(mean, error, also, said):
    assert claims.verdict(mean, error, also) == said


def steps(first, second, n=40, lead=0.7):
    """What probe_js finds where JS to the two candidates is first and second, or so."""
    spread = np.linspace(0.9, 1.1, n)
    js = [first * spread, second * spread]
    return np.stack([np.arange(n) // 2, np.arange(n), np.ones(n), np.full(n, lead), *js, *js], 1)


@pytest.mark.parametrize("first, second, said", [
    (0.01, 0.5, "holds"), (0.2, 0.5, "in part"), (0.5, 0.01, "does not hold"),
    (0.3, 0.3, "unclear")])
def test_claim_of_js(first, second, said):
    found = claims.of_js(steps(first, second), 0.5, 5)
    assert [verdict for _, _, verdict in found] == [said] * 2          # no weight is below 0.5
    assert "40 steps of 20 questions" in found[0][1] and f"{first:.3f}" in found[0][1]
    assert len(claims.of_js(steps(first, second, lead=0.4), 0.5, 5)) == 3


def test_claims_of_lens_and_branching():
    both, share = np.zeros((40, 6), bool), np.full((40, 6), 0.97)
    question = np.arange(40)
    assert claims.of_lens(both, share, question)[0][2] == "does not hold"
    both[:36, 3] = True
    assert claims.of_lens(both, share, question)[0][2] == "holds"
    share[:, -1] = 0.6
    assert claims.of_lens(both, share, question)[0][2] == "does not hold"
    first = question > 3
    assert claims.of_branching(first, ~first, question)[0][2] == "holds"
    assert claims.of_branching(question > 15, question <= 15, question)[0][2] == "unclear"


def test_claim_of_randomness():
    """Gumbel noise is compared with Dirichlet noise of the same softness."""
    one, question = np.ones(30), np.arange(30)
    found = {"dirichlet gamma 1": (0.4 * one, 0.0 * one), "dirichlet gamma 4": (0.2 * one, one),
             "gumbel tau 0.5": (0.7 * one + 0.01 * question, 0.5 * one)}
    ((_, numbers, said),) = claims.of_randomness(found, question)
    assert said == "holds" and "softness 0.300" in numbers
    found["gumbel tau 0.5"] = (0.3 * one + 0.01 * (question - 14.5), 0.5 * one)
    assert claims.of_randomness(found, question)[0][2] == "unclear"


def test_a_deep_lens_has_layers_as_rows(tmp_path, capsys):
    weights = (1.0, 0.6, 0.0)
    found = np.random.default_rng(0).random((5, 3, 9, 4))
    lens, visible = probe_sheets.lens(found, weights, [0, 0, 1, 1, 2])
    assert lens["columns"] == ["", "w = 1", "w = 0.6", "w = 0"]
    assert [row[0] for row in lens["rows"]][::9] == ["embedding", "probability of both"]
    assert lens["rows"][4][2] == pytest.approx(found[:, 1, 4, 0].mean())
    assert [row[1] for row in visible["rows"]] == [100] * 9            # all ranks are below 10
    sheets.show(lens)
    files = sheets.write([lens, visible], tmp_path, n=5)
    assert {path.name for path in tmp_path.iterdir()} == set(files)
    assert "w = 0.6" in capsys.readouterr().out and (tmp_path / "lens.svg").stat().st_size > 1000


# ---------------------------------------------------------------- whole runs


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with a random Llama, in an empty working folder."""
    monkeypatch.chdir(tmp_path)
    data_prep.write_dataset(tmp_path / "data" / "chains", chains((2, 2, 3)))
    return write_folder(tmp_path / "llama", num_hidden_layers=1, max_position_embeddings=400)


SMALL = "--draws 2 --max-think 5 --max-new 4 --forks 3 --device cpu --dtype float32".split()


def test_a_run_with_a_language_model(folder, tmp_path, capsys):
    """Of a Hugging Face folder: questions of chains where multiarith is not there, all modes, all
    probes, the claims; sizes are those of a language model."""
    assert run(["--model", folder, "--n", "2", *SMALL]) == 0
    text = capsys.readouterr().out
    assert "data_prep.py multiarith" in text and "Claims of arXiv 2508.03440" in text
    out = tmp_path / "out" / "soft-llama-chains-0"
    modes = json.loads((out / "modes.json").read_text())
    assert [row[0] for row in modes["rows"]] == list(st.MODES) and modes["n"] == 2
    assert modes["flags"]["uncertain"] == FREE["uncertain"] and "weak at sums" in modes["title"]
    assert {"js-lead.svg", "lens-visible.svg", "branching.svg"} <= {p.name for p in out.iterdir()}


def test_a_question_of_your_own(folder, tmp_path, capsys):
    """--prompt: what every mode says, and no table; with a probe, the probe. --prompt-template
    replaces the chat."""
    argv = ["--model", folder, "--prompt", "What is 2 + 3?", *SMALL]
    assert run(argv) == 0
    text = capsys.readouterr().out
    assert all(f"\n{mode}: " in text for mode in st.MODES) and "accuracy" not in text
    assert run([*argv, "--probe", "js", "--prompt-template", "Q: {prompt}\nA:"]) == 0
    assert "JS divergence" in capsys.readouterr().out
    check_refusal([*argv, "--prompt-template", "Q:"], capsys, "{prompt}")


def test_a_question_that_is_too_long(folder, capsys):
    check_refusal(["--model", folder, "--prompt", "long " * 99, *SMALL], capsys, "--max-think 5",
                  "400")
