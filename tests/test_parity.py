"""Our numbers against those of the authors' own implementation, on a tiny GPT-2: every file of
tests/golden."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import coconut
import codi
from common.text import CODI_MARK, Example, Examples, collate, colons
from tiny import codi_flags, decoding, setup_of, tiny_model

GOLDEN = {path.stem: json.loads(path.read_text())
          for path in sorted((Path(__file__).parent / "golden").glob("*.json"))}
SETTING = {"tiny", "seed", "ids", "examples"}                  # what the sections of a file share
SECTIONS = {"gpt2", "coconut", "codi", "soft_thinking"}        # the last: test_soft_thinking.py


def cases(section, name):
    """(golden, case) for each case of a section of each file that has it. name: case -> its id."""
    found = []
    for file, golden in GOLDEN.items():
        for case in golden.get(section, []):
            found.append(pytest.param(golden, case, id=f"{file}-{name(case)}"))
    return found


GPT2 = [pytest.param(golden, id=file) for file, golden in GOLDEN.items() if "gpt2" in golden]
COCONUT = cases("coconut", lambda case: f"stage{case['stage']}-c{case['c']}")
CODI = cases("codi", lambda case: f"{case['n_latent']}-thoughts")


def test_there_are_golden_files():
    """Without files the parametrised tests below would pass by being empty."""
    assert GOLDEN and GPT2 and COCONUT and CODI


@pytest.mark.parametrize("file", GOLDEN)
def test_every_file_is_of_a_known_kind(file):
    """A file with other contents would be compared with nothing."""
    keys = GOLDEN[file].keys()
    assert SETTING <= keys and keys & SECTIONS and keys <= SETTING | SECTIONS, f"{file}: {keys}"


def close(a, b, rel, least=1e-5):
    return torch.allclose(a, torch.as_tensor(b), rtol=rel, atol=least)


# ---------------------------------------------------------------- GPT-2

@pytest.mark.parametrize("golden", GPT2)
def test_gpt2(golden):
    """Logits and ln_f outputs are those of GPT-2."""
    model, expected = tiny_model(golden["seed"], **golden["tiny"]), golden["gpt2"]
    h = model(torch.tensor([expected["input"]]))[0]
    logits = model.head(h)
    assert close(logits.logsumexp(-1), expected["logits_logsumexp"], 1e-5)
    assert close(logits[-1, :8], expected["last_logits_first8"], 1e-4)
    assert close(h[-1, :8], expected["last_hidden_first8"], 1e-4)


# ---------------------------------------------------------------- Coconut

def setting(golden, case):
    """The model, its special ids, and the golden examples as Sequences of this stage."""
    tok = SimpleNamespace(**golden["ids"])
    sequences = [coconut.curriculum(Example(**e), case["stage"], case["c"], case["max_stage"],
                                    "coconut", tok) for e in golden["examples"]]
    return tiny_model(golden["seed"], **golden["tiny"]), tok, sequences


@pytest.mark.parametrize("golden, case", COCONUT)
def test_loss_and_gradients(golden, case):
    """All examples as one left-padded batch: the loss, and gradients that went through the
    thoughts."""
    model, tok, sequences = setting(golden, case)
    assert {q.n_latent for q in sequences} == {case["n_latent"]}
    loss, _ = coconut.coconut_loss(model, collate(sequences, tok.pad))
    loss.backward()
    assert loss.item() == pytest.approx(case["loss"], rel=1e-4)
    for weight, norm in ((model.h[0].attn.c_attn.weight, case["grad_norm_h0_c_attn"]),
                         (model.wte.weight, case["grad_norm_wte"])):
        assert weight.grad.norm().item() == pytest.approx(norm, rel=1e-3)


@pytest.mark.parametrize("golden, case", COCONUT)
def test_thoughts_and_answers(golden, case, machine):
    """Thoughts and greedy tokens of each example alone are the authors', and a batch gives the
    same.

    The authors' code lets a first token pass that is eos; an answer ends there, so the list is cut.
    """
    model, tok, sequences = setting(golden, case)
    s = setup_of(model, tok, machine, decoding(12))
    alone = [coconut.think_and_answer(s, [q]) for q in sequences]
    for (rows, thoughts, _), expected in zip(alone, case["per_example"]):
        greedy = expected["greedy"]
        assert rows == [greedy[:greedy.index(tok.eos)] if tok.eos in greedy else greedy]
        assert thoughts.shape[:2] == (1, case["n_latent"])
        first4 = torch.tensor(expected["latents_first4"]).reshape(-1, 4)
        assert close(thoughts[0, :, :4], first4, 1e-4)
    rows, thoughts, _ = coconut.think_and_answer(s, sequences)
    assert rows == [row for (row,), *_ in alone]
    assert close(thoughts, torch.cat([t for _, t, _ in alone]), 1e-4)


# ---------------------------------------------------------------- CODI

def golden_projection(flags, C, seed):
    """CODI's projection with the recipe's weights, drawn in the order of the golden names."""
    projection = codi.make_projection(flags, C).eval()
    rng, state = np.random.RandomState(seed), projection.state_dict()
    for name in ("1.bias", "1.weight", "3.bias", "3.weight", "ln.bias", "ln.weight"):
        ours = state[name.replace("ln.", "4.")]
        n = torch.from_numpy(rng.standard_normal(tuple(ours.shape)).astype(np.float32))
        if name == "ln.weight":
            n = 1 + 0.1 * n
        else:
            n = (0.1 if name.endswith("bias") else 0.15) * n
        ours.copy_(n)
    return projection


def codi_setting(golden, case):
    """Model, projection, flags, pad, and of each golden example what student and teacher read, and
    how many tokens before the end the ":" is."""
    model, tok = tiny_model(golden["seed"], **golden["tiny"]), SimpleNamespace(**golden["ids"])
    flags = codi_flags(n_latent=case["n_latent"], projection=case["projection"], kd="smooth-l1",
                       kd_normalize=case["divide_by_std"])
    C, mark = model.config.n_embd, case["answer_prompt"]
    projection = torch.nn.Identity()
    if case["projection"]:
        projection = golden_projection(flags, C, case["projection_seed"])
    tok.decode = lambda ids: CODI_MARK if ids == mark else "x" * len(ids)
    examples = Examples(Examples.pack([Example(e["question"], e["steps"], mark + e["answer"])
                                       for e in golden["examples"]]))
    to_end = examples.lengths.answer - colons(examples, tok, flags.distill_at, "golden")
    pairs = [codi.sequences(e, flags, tok) for e in examples]
    return model, projection, flags, tok.pad, pairs, torch.tensor(to_end)


@pytest.mark.parametrize("golden, case", CODI)
def test_codi_losses(golden, case):
    """The three losses of each example alone are the authors'; a padded batch gives their means."""
    model, projection, flags, pad, pairs, to_end = codi_setting(golden, case)

    def losses(rows):
        student, teacher = (collate(side, pad) for side in zip(*(pairs[i] for i in rows)))
        return codi.codi_loss(model, projection, student, teacher, to_end[list(rows)], flags)

    expected = case["per_example"]
    names = dict(student="student_ce", kd="distill", teacher="teacher_ce")
    for i, one in enumerate(expected):
        loss, terms = losses([i])
        assert loss.item() == pytest.approx(one["loss"], rel=1e-4)
        for ours, theirs in names.items():
            assert terms[ours].item() == pytest.approx(one[theirs], rel=1e-4)
    _, terms = losses(range(len(pairs)))
    students, teachers = zip(*pairs)
    for ours, side in (("student", students), ("kd", None), ("teacher", teachers)):
        labels = [len(q.language) - 1 for q in side] if side else None     # kd: every row alike
        mean = np.average([one[names[ours]] for one in expected], weights=labels)
        assert terms[ours].item() == pytest.approx(mean, rel=1e-4)
