"""Our numbers against those of the authors' own implementation, on a tiny GPT-2 (tests/golden)."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import codi
import coconut
import data_prep
from codi import PROMPT
from tiny import codi_flags, decoding, tiny_model

GOLDEN = {path.stem: json.loads(path.read_text()) for path in sorted((Path(__file__).parent / "golden").glob("*.json"))}
CASES = [pytest.param(golden, case, id=f"{name}-stage{case['stage']}-c{case['c']}")
         for name, golden in GOLDEN.items() for case in golden["coconut"]]


def test_there_are_golden_files():
    """Without files the parametrised tests below would pass by being empty."""
    assert GOLDEN and CASES


def setting(golden, case):
    """The model, its special ids, and the golden examples as Sequences of this stage."""
    tok = SimpleNamespace(**golden["ids"])
    examples = [data_prep.Example(**e) for e in golden["examples"]]
    sequences = [coconut.curriculum(e, case["stage"], case["c"], case["max_stage"], "coconut", tok) for e in examples]
    return tiny_model(golden["seed"], **golden["tiny"]), tok, sequences


def close(a, b, rel, least=1e-5):
    return torch.allclose(a, torch.as_tensor(b), rtol=rel, atol=least)


@pytest.mark.parametrize("golden", GOLDEN.values(), ids=GOLDEN)
def test_gpt2(golden):
    """Logits and ln_f outputs are those of GPT-2."""
    model, expected = tiny_model(golden["seed"], **golden["tiny"]), golden["gpt2"]
    h = model(torch.tensor([expected["input"]]))[0]
    logits = model.head(h)
    assert close(logits.logsumexp(-1), expected["logits_logsumexp"], 1e-5)
    assert close(logits[-1, :8], expected["last_logits_first8"], 1e-4)
    assert close(h[-1, :8], expected["last_hidden_first8"], 1e-4)


@pytest.mark.parametrize("golden, case", CASES)
def test_loss_and_gradients(golden, case):
    """All examples as one left-padded batch: the loss, and gradients that went through the thoughts."""
    model, tok, sequences = setting(golden, case)
    assert {s.n_latent for s in sequences} == {case["n_latent"]}
    loss, _ = coconut.coconut_loss(model, data_prep.collate(sequences, tok.pad))
    loss.backward()
    assert loss.item() == pytest.approx(case["loss"], rel=1e-4)
    assert model.h[0].attn.c_attn.weight.grad.norm().item() == pytest.approx(case["grad_norm_h0_c_attn"], rel=1e-3)
    assert model.wte.weight.grad.norm().item() == pytest.approx(case["grad_norm_wte"], rel=1e-3)


@pytest.mark.parametrize("golden, case", CASES)
def test_thoughts_and_answers(golden, case, machine):
    """Thoughts and greedy tokens of each example alone are the authors', and a batch gives the same.

    The authors' code lets a first token pass that is eos; an answer ends there, so the list is cut.
    """
    model, tok, sequences = setting(golden, case)
    alone = [coconut.answer(model, [s], tok, decoding(12), machine) for s in sequences]
    for (rows, thoughts, _), expected in zip(alone, case["per_example"]):
        greedy = expected["greedy"]
        assert rows == [greedy[:greedy.index(tok.eos)] if tok.eos in greedy else greedy]
        assert thoughts.shape[:2] == (1, case["n_latent"])
        assert close(thoughts[0, :, :4], torch.tensor(expected["latents_first4"]).reshape(-1, 4), 1e-4)
    rows, thoughts, _ = coconut.answer(model, sequences, tok, decoding(12), machine)
    assert rows == [row for (row,), *_ in alone]
    assert close(thoughts, torch.cat([t for _, t, _ in alone]), 1e-4)


CODI = [pytest.param(golden, case, id=f"{name}-{case['n_latent']}-thoughts") for name, golden in GOLDEN.items() for case in golden["codi"]]


def codi_setting(golden, case):
    """Model, projection with the recipe's weights, flags and the golden examples as Pairs."""
    model, tok = tiny_model(golden["seed"], **golden["tiny"]), SimpleNamespace(**golden["ids"])
    flags = codi_flags(n_latent=case["n_latent"], projection=case["projection"], kd="smooth-l1", kd_normalize=case["divide_by_std"])
    projection = codi.make_projection(flags, model.config.n_embd).eval()
    if case["projection"]:
        rng, state = np.random.RandomState(case["projection_seed"]), projection.state_dict()
        names = {name.replace("ln.", "4."): name for name in ("1.bias", "1.weight", "3.bias", "3.weight", "ln.bias", "ln.weight")}
        for name, golden_name in sorted(names.items(), key=lambda pair: pair[1]):
            n = torch.from_numpy(rng.standard_normal(tuple(state[name].shape)).astype(np.float32))
            state[name].copy_(1 + 0.1 * n if golden_name == "ln.weight" else (0.1 if name.endswith("bias") else 0.15) * n)
    prompt = case["answer_prompt"]
    tok.decode = lambda ids: PROMPT if ids == prompt else "x" * len(ids)        # its last token ends the prompt
    examples = [data_prep.Example(e["question"], e["steps"], prompt + e["answer"]) for e in golden["examples"]]
    return model, projection, tok, flags, codi.Pairs(data_prep.Examples(data_prep.Examples.pack(examples)), flags, tok, "golden")


@pytest.mark.parametrize("golden, case", CODI)
def test_codi_losses(golden, case):
    """The three losses of each example alone are the authors'; a padded batch gives their means."""
    model, projection, tok, flags, pairs = codi_setting(golden, case)
    for i, expected in enumerate(case["per_example"]):
        loss, parts = codi.codi_loss(model, projection, *pairs.batch([i], tok.pad, "cpu"), flags)
        assert loss.item() == pytest.approx(expected["loss"], rel=1e-4)
        for ours, theirs in (("student", "student_ce"), ("kd", "distill"), ("teacher", "teacher_ce")):
            assert parts[ours].item() == pytest.approx(expected[theirs], rel=1e-4)
    _, parts = codi.codi_loss(model, projection, *pairs.batch(range(len(golden["examples"])), tok.pad, "cpu"), flags)
    assert parts["kd"].item() == pytest.approx(np.mean([e["distill"] for e in case["per_example"]]), rel=1e-4)
    for ours, theirs, side in (("student", "student_ce", 0), ("teacher", "teacher_ce", 1)):
        labels = [len(pair[side].language) - 1 for pair in pairs]
        assert parts[ours].item() == pytest.approx(np.average([e[theirs] for e in case["per_example"]], weights=labels), rel=1e-4)
