"""codi.py: what teacher and student read, where they are compared, what learns; whole runs on tiny
data."""

import json
import os
import re
import signal
import sys
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F

import codi
import data_prep
import test_runs
from common import optim, run as run_module, runtime, schedule, tables
from common.puzzles import SPLITS, chains
from common.run import Run
from common.text import (CODI_MARK, Example, Examples, Sequence, Tokenizer, collate, colons,
                         tokenize)
from gpt2 import GrowingCache
from test_runs import Compiled, metrics, same
from tiny import codi_flags, setup_of, tiny_model, weights

BOT, EOT, EOS, PAD = 64, 65, 62, 63
QUESTION, STEPS, ANSWER = [1, 2, 3], [[10, 11], [20], [30, 31]], [7, 8, 9, 40, EOS]
SMALL = ("--device cpu --dtype float32 --n-layer 1 --n-head 2 --n-embd 16 --n-latent 2 "
         "--batch-size 4 --steps 11 --eval-every 4 --eval-items 4 --max-new 10 --save-every 3 "
         "--ood none --no-again")


class Pair(NamedTuple):
    """What teacher and student read of one example, and where in each language the ":" is."""
    student: Sequence
    teacher: Sequence
    at: tuple

    @classmethod
    def all(cls, examples, flags, tok, where="here"):
        """The Pairs of Examples, made as codi.train makes them."""
        to_end = examples.lengths.answer - colons(examples, tok, flags.distill_at, where)
        pairs = []
        for example, n in zip(examples, to_end.tolist()):
            sides = codi.sequences(example, flags, tok)
            pairs.append(cls(*sides, tuple(len(side.language) - n for side in sides)))
        return pairs


def batch_of(pairs, pad=PAD):
    """(student Batch, teacher Batch, colon) of some Pairs: what codi_loss takes."""
    students, teachers, _ = zip(*pairs)
    colon = [len(pair.teacher.language) - pair.at[1] for pair in pairs]
    return collate(students, pad), collate(teachers, pad), torch.tensor(colon)


@pytest.fixture
def tok(tok):
    """Tokens 7 8 9 are "The answer is:"."""
    tok.decode = lambda ids: CODI_MARK if ids == [7, 8, 9] else "x" * len(ids)
    return tok


@pytest.fixture
def pairs(examples, tok):
    answered = [e._replace(answer=[7, 8, 9] + e.answer) for e in examples]
    return Pair.all(Examples(Examples.pack(answered)), codi_flags(), tok)


@pytest.fixture
def projection():
    torch.manual_seed(1)
    return codi.make_projection(codi_flags(), 32)


# ---------------------------------------------------------------- what is read

ALL = [10, 11, 20, 30, 31]


@pytest.mark.parametrize("method, keep, words", [
    ("codi", False, [10, 11, 20]), ("codi", True, ALL), ("cot", True, ALL),
    ("cot", False, [10, 11, 20]), ("no-cot", False, [])])
def test_sequences(tok, method, keep, words):
    flags = codi_flags(method=method, keep_last_step=keep)
    student, teacher = codi.sequences(Example(QUESTION, STEPS, ANSWER), flags, tok)
    assert student == ([1, 2, 3, BOT], 3, [EOT, *ANSWER])
    assert teacher == ([1, 2], 0, [3, *words, *ANSWER])


def test_an_example_without_steps(tok):
    _, teacher = codi.sequences(Example(QUESTION, [], ANSWER), codi_flags(), tok)
    assert teacher.language == [3, *ANSWER]


@pytest.mark.parametrize("method, keep", [("codi", False), ("codi", True), ("cot", True),
                                          ("no-cot", False)])
def test_lengths_are_those_of_the_teacher(examples, tok, method, keep):
    """Batches are made of items alike in the length of what the teacher reads."""
    flags = codi_flags(method=method, keep_last_step=keep)
    found = codi.lengths(Examples(Examples.pack(examples)), flags)
    for example, (prompt, language) in zip(examples, found.tolist()):
        _, teacher = codi.sequences(example, flags, tok)
        assert (prompt, language) == (len(teacher.prompt), len(teacher.language))


@pytest.fixture(scope="module")
def words_tok():
    return Tokenizer.compact("\n".join([d["question"], *d["steps"], CODI_MARK + d["answer"]])
                             for d in chains((400, 1, 1))["train"])


@pytest.mark.parametrize("pattern", ["numbers-apart", "gpt2", "is-a"])
@pytest.mark.parametrize("question, steps, answer", [
    ("How many?", ["<<1+1=2>>", "<<2+3=5>>"], "5"),
    ("The answer is: not here. How many?", ["The answer is: wrong.", "<<2+3=5>>"], "5"),  # thrice
    ("How many?", ["<<1-6=-5>>"], "-5"), ("How many?", [], "1,450"), ("How many?", [], "$4.50"),
    ("Is Bob a cat?", ["Bob is a cat."], "Bob is a cat."),
    ("How many?", [], "The answer is: 5")])
def test_the_colon(pattern, question, steps, answer):
    """Student and teacher are compared at the token that ends the prompt: what comes after it is
    the answer."""
    items = [dict(question=question, steps=steps, answer=answer)]
    written = question + "\n" + "\n".join(steps) + "\n" + CODI_MARK + answer
    tok = Tokenizer.compact([written], pattern)
    pair, = Pair.all(tokenize(items, tok, 1000, 8, "here", CODI_MARK), codi_flags(), tok)
    for side, column in zip((pair.student, pair.teacher), pair.at):
        assert side.language[-1] == tok.eos
        assert tok.decode(side.language[column + 1:-1]).strip() == answer
        assert tok.decode(side.language[:column + 1]).rstrip().endswith("The answer is:")
    assert pair.student.language[:1] == [tok.eot]


@pytest.mark.parametrize("at, last", [("The", "The"), ("The answer is", " is")])
def test_other_distill_tokens(words_tok, at, last):
    items = [dict(question="How many?", steps=["<<1+1=2>>"], answer="2")]
    examples = tokenize(items, words_tok, 1000, 8, "here", CODI_MARK)
    pair, = Pair.all(examples, codi_flags(distill_at=at), words_tok)
    for side, column in zip((pair.student, pair.teacher), pair.at):
        assert words_tok.decode([side.language[column]]) == last


def test_absent_prompt_names_the_item(words_tok):
    items = [dict(question="How many?", steps=[], answer=a) for a in "12"]
    one, other = tokenize(items, words_tok, 100, 8, "here", CODI_MARK)
    other = other._replace(answer=words_tok.encode("So it is 2") + [words_tok.eos])
    with pytest.raises(runtime.UserError, match="train.json, item 2: .*So it is 2"):
        Pair.all(Examples(Examples.pack([one, other])), codi_flags(), words_tok, "train.json")


# ---------------------------------------------------------------- the loss

def test_projected_state_is_fed_back(model, projection):
    """Thought i + 1 reads the projection of the state at thought i; --no-projection reads the state
    itself."""
    prompt = torch.tensor([[5, 6, BOT]])
    for project in (projection, codi.make_projection(codi_flags(projection=False), 32)):
        cache = GrowingCache()
        x, _, states = codi.think(model, project, cache, model.wte(prompt), None, 3)
        sequence = model.wte(prompt)
        for i in range(3):
            h = model(embeds=sequence)[:, -1:]
            assert torch.allclose(states[:, i:i + 1], h, atol=1e-5)
            sequence = torch.cat([sequence, project(h)], 1)
        assert torch.allclose(x, sequence[:, -1:], atol=1e-5)
    assert torch.equal(project(h), h)


@pytest.mark.parametrize("std", [1.0, 0.1])
def test_initial_spread_of_thoughts(std):
    projection = codi.make_projection(codi_flags(thought_std=std), 32)
    spread = projection(3 * torch.randn(8, 32)).std(-1, correction=0)
    assert torch.allclose(spread, torch.full((8,), std), rtol=0.01)


def test_no_thoughts(model, projection):
    x = model.wte(torch.tensor([[5, 6, BOT]]))
    left, _, states = codi.think(model, projection, GrowingCache(), x, None, 0)
    assert left is x and states.shape == (1, 0, 32)


def test_question_read_once_is_question_read_twice(model, projection, pairs):
    """The shared prefix changes nothing: the same losses as of two whole sequences."""
    _, terms = codi.codi_loss(model, projection, *batch_of(pairs), codi_flags())
    for pair in pairs:
        student, teacher = pair.student, pair.teacher
        x = model.wte(torch.tensor([student.prompt]))
        for _ in range(3):
            x = torch.cat([x, projection(model(embeds=x)[:, -1:])], 1)
        x = torch.cat([x, model.wte(torch.tensor([student.language]))], 1)
        said = model(embeds=x, all_states=True)
        words = model(torch.tensor([teacher.prompt + teacher.language]), all_states=True)
        at = []
        for states, side, column in zip((said, words), (student, teacher), pair.at):
            in_language = [h[:, -len(side.language):] for h in states]
            at.append(torch.stack([h[:, column] for h in in_language]))
        _, one = codi.codi_loss(model, projection, *batch_of([pair]), codi_flags())
        assert one["kd"].item() == pytest.approx(codi.distance(*at).item(), rel=1e-4)
        logits = model.head(said[-1][0, -len(student.language):-1])
        expected = F.cross_entropy(logits, torch.tensor(student.language[1:]))
        assert one["student"].item() == pytest.approx(expected.item(), rel=1e-4)
        terms["kd"] = terms["kd"] - one["kd"] / 5
    assert abs(terms["kd"].item()) < 1e-5                    # a batch's is the mean of its rows'


@pytest.mark.parametrize("method", ["cot", "no-cot"])
def test_a_baseline_learns_its_words(model, examples, tok, method):
    """Its loss is the cross-entropy of all that follows the question; nothing else is computed."""
    flags = codi_flags(method=method, keep_last_step=True, gamma=0.0)
    answered = [e._replace(answer=[7, 8, 9] + e.answer) for e in examples]
    pairs = Pair.all(Examples(Examples.pack(answered)), flags, tok)
    loss, terms = codi.codi_loss(model, torch.nn.Identity(), *batch_of(pairs), flags)
    assert terms == {} and loss.requires_grad
    total, n = 0.0, 0
    for pair in pairs:
        ids = pair.teacher.prompt + pair.teacher.language
        labels = torch.tensor(pair.teacher.language[1:])
        logits = model.head(model(torch.tensor([ids]))[0, -len(labels) - 1:-1])
        total += F.cross_entropy(logits, labels, reduction="sum").item()
        n += len(labels)
    assert loss.item() == pytest.approx(total / n, rel=1e-4)


def gradients(model, projection, loss):
    parameters = [*model.parameters(), *projection.parameters()]
    grads = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
    return [torch.zeros(1) if g is None else g for g in grads]


def test_stop_gradient(model, projection, pairs):
    """L_KD has the gradient that it has with a frozen copy as teacher: none goes through the
    teacher's pass."""
    batch, static = batch_of(pairs), tiny_model().requires_grad_(False)
    _, terms = codi.codi_loss(model, projection, *batch, codi_flags())
    _, frozen = codi.codi_loss(model, projection, *batch, codi_flags(), static=static)
    assert terms["kd"].item() == pytest.approx(frozen["kd"].item(), rel=1e-5)
    ours, theirs = (gradients(model, projection, t["kd"]) for t in (terms, frozen))
    assert any(g.abs().sum() > 0 for g in ours)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(ours, theirs))


def test_gradient_reaches_the_question_through_the_thoughts(model, projection, pairs):
    """L_student by itself moves the embedding of a token that only the question has, and the
    projection."""
    _, terms = codi.codi_loss(model, projection, *batch_of(pairs[1:2]), codi_flags())
    grads = gradients(model, projection, terms["student"])
    only = set(pairs[1].student.prompt) - set(pairs[1].student.language)
    assert all(grads[0][token].abs().sum() > 0 for token in only)
    assert all(g.abs().sum() > 0 for g in grads[-6:])


def test_gamma_0_does_not_teach_the_teacher(model, projection, pairs):
    """Without its loss, words that only the teacher reads get no gradient."""
    for gamma, learns in ((0.0, False), (1.0, True)):
        flags = codi_flags(gamma=gamma, alpha=0.0, beta=0.0)
        loss, _ = codi.codi_loss(model, projection, *batch_of(pairs[:1]), flags)
        assert loss.requires_grad
        grads = gradients(model, projection, loss)
        assert (sum(g.abs().sum() for g in grads) > 0) == learns


@pytest.mark.parametrize("kind, normalize, expected", [
    ("l1", False, 1.5), ("l2", False, 2.5), ("smooth-l1", False, 1.0),
    ("l1", True, 1.5 / 2 ** 0.5), ("smooth-l1", True, 1.0 / 2 ** 0.5)])
def test_distance_by_hand(kind, normalize, expected):
    """Differences 1 and 2; the teacher's state (0, 2) has the standard deviation sqrt 2."""
    student, teacher = torch.tensor([[[1.0, 4.0]]]), torch.tensor([[[0.0, 2.0]]])
    found = codi.distance(student, teacher, kind, normalize)
    assert found.item() == pytest.approx(expected)


# ---------------------------------------------------------------- decoding

@pytest.mark.parametrize("side", [0, 1], ids=["student", "teacher"])
def test_batch_answers_as_one_by_one(model, projection, pairs, tok, machine, side):
    rows, flags = [pair[side] for pair in pairs], codi_flags()
    s = setup_of(model, tok, machine, flags, projection.eval())
    together, states, _ = codi.think_and_answer(s, rows)
    for i, row in enumerate(rows):
        alone, own, _ = codi.think_and_answer(s, [row])
        assert alone == [together[i]] and torch.allclose(own[0], states[i], atol=1e-4)
        # and without a cache
        x = model.wte(torch.tensor([row.prompt])) if row.prompt else torch.zeros(1, 0, 32)
        for _ in range(row.n_latent):
            x = torch.cat([x, projection(model(embeds=x)[:, -1:])], 1)
        x, said = torch.cat([x, model.wte(torch.tensor([row.language[:1]]))], 1), []
        while len(said) < flags.max_new:
            token = model.head(model(embeds=x)[:, -1]).argmax(-1)
            if token.item() == EOS:
                break
            said.append(token.item())
            x = torch.cat([x, model.wte(token)[:, None]], 1)
        assert said == together[i]


# ---------------------------------------------------------------- LoRA

LORA = dict(lora_r=4, lora_alpha=8.0, lora_dropout=0.0, optimizer="adamw", lr=1e-2)


def trained_lora(pairs, projection, **changed):
    flags, model = codi_flags(**LORA | changed), tiny_model()
    optim.add_lora(model, flags, [BOT, EOT])
    before = {k: v.clone() for k, v in model.state_dict().items()}
    optimizers = optim.new_optimizers(flags, model, projection)
    for _ in range(3):
        loss, _ = codi.codi_loss(model, projection, *batch_of(pairs), flags)
        loss.backward()
        optim.step(optimizers, [], 0)
    return model, before, flags


def test_lora_starts_as_the_model_was():
    model, plain = tiny_model(), tiny_model()
    optim.add_lora(model, codi_flags(**LORA), [BOT, EOT])
    ids = torch.tensor([[1, 2, 3, 4]])
    assert torch.equal(model(ids), plain(ids))


@pytest.mark.parametrize("marks", [True, False])
def test_only_lora_projection_and_chosen_rows_change(pairs, projection, marks):
    was = {k: v.clone() for k, v in projection.state_dict().items()}
    model, before, _ = trained_lora(pairs, projection, train_marks=marks)
    changed = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    lora = set()
    for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"):
        lora |= {f"h.{i}.{name}.{side}" for i in range(3) for side in "ab"}
    assert changed == lora | ({"wte.weight"} if marks else set())
    moved = (model.wte.weight != before["wte.weight"]).any(1)
    assert moved.nonzero().flatten().tolist() == ([BOT, EOT] if marks else [])
    assert all(not torch.equal(v, was[k]) for k, v in projection.state_dict().items())


def test_merged_is_unmerged(pairs, projection):
    """The plain GPT-2 that is saved answers as the model with LoRA."""
    model, _, flags = trained_lora(pairs, projection)
    plain = tiny_model()
    plain.load_state_dict(optim.merged(model.state_dict(), flags.lora_alpha, flags.lora_r))
    ids = torch.tensor([[1, 2, 3, 4, BOT]])
    assert not torch.allclose(plain(ids), tiny_model()(ids), atol=1e-2)
    assert torch.allclose(plain(ids), model(ids), atol=1e-4)


# ---------------------------------------------------------------- schedule and flags

def test_cosine():
    rates = [optim.cosine(i, 100, 2.0, 10) for i in range(100)]
    assert rates[0] == 0.2 and rates[9] == 2.0 == max(rates)
    assert rates[55] == pytest.approx(1.0) and 0 < rates[99] < 0.01
    assert rates[10:] == sorted(rates[10:], reverse=True)


def test_trapezoid():
    rates = [optim.SCHEDULES["trapezoid"](i, 100, 2.0, 10) for i in range(100)]
    assert rates[0] == 0.2 and rates[9:70] == [2.0] * 61
    assert rates[85] == pytest.approx(1.0) and rates[99] == pytest.approx(2 / 30)


def test_recipe_is_the_papers():
    flags, _ = codi.parse_flags(["--recipe", "gsm8k"])
    assert (flags.epochs, flags.lr, flags.batch_size, flags.n_latent) == (40, 3e-3, 128, 6)
    assert (flags.lora_r, flags.lora_alpha, flags.lora_dropout) == (128, 32, 0.1)
    assert (flags.warmup, flags.weight_decay, flags.grad_clip) == (0.03, 0.1, 2.0)
    assert (flags.alpha, flags.beta, flags.gamma) == (1, 1, 1)
    assert flags.init == "gpt2" and flags.kd == "smooth-l1" and flags.thought_std == 1
    assert flags.kd_normalize and not flags.keep_last_step and flags.digits_only


@pytest.mark.parametrize("argv, word", [
    ("--distill-at answer", "no beginning"), ("--table --rows codi,nonsense", "nonsense"),
    ("--lora-r 4 --optimizer muon", "adamw"),
    ("--momentum 0.9 --optimizer adamw", "--momentum is Muon's"),
    ("--steps 3 --epochs 1", "exclude"), ("--n-embd 10 --n-head 3", "multiple"),
    ("--ask hello", "--eval-only"),
    ("--teacher x.pt --method cot", "no student"), ("--table --resume", "--table"),
    ("--init gpt2 --tokenizer compact", "--tokenizer"), ("--alpha -1", "between"),
    ("--n-latent x", "whole number"), ("--kd l3", "invalid choice"),
    ("--rows codi", "--table"), ("--rows nonsense", "--table"), ("--seeds 2", "--table"),
    ("--beside table.json", "--table"), ("--seeds 2 --eval-only best.pt", "--table")])
def test_bad_flags(argv, word, capsys):
    with pytest.raises(SystemExit) as stop:
        codi.parse_flags(argv.split())
    assert stop.value.code == 2 and word in capsys.readouterr().err.splitlines()[-1]


# ---------------------------------------------------------------- runs

def run(argv):
    """`python codi.py ARGV` in this process; returns the exit code."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(sys, "argv", ["codi.py", *map(str, argv)])
        runtime.run_main(codi.main)
    return stop.value.code or 0


def start(data, out, more=""):
    small = test_runs.without_shape(SMALL) if "--init" in more else SMALL
    return ["--data", data, "--out", out, *small.split(), *more.split()]


VARIANTS = {
    "plain": "--dropout 0.1 --projection-dropout 0.1 --optimizer muon",
    "lora": "--lora-r 3 --lora-dropout 0.1 --optimizer adamw",
    "again": "--again --steps 3 --dropout 0.1",          # 3 updates, and five times 3 again
}


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """{variant: what an uninterrupted run leaves}"""
    folder = tmp_path_factory.mktemp("whole")
    for variant, more in VARIANTS.items():
        assert run(start(data, folder / variant, more)) == 0
    return {variant: outcome(folder / variant) for variant in VARIANTS}


def outcome(out):
    """What a run leaves behind and what must not depend on interruptions."""
    best, last = (torch.load(out / name, weights_only=True) for name in ("best.pt", "last.pt"))
    return best["model"], best["projection"], last["model"], metrics(out)


def stopping_after(updates, monkeypatch):
    """Ctrl-C after each of these updates."""
    step = Run.step

    def stopping(self, *args, **where):
        step(self, *args, **where)
        if self.at["done"] in updates:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(Run, "step", stopping)


@pytest.mark.parametrize("variant", VARIANTS)
def test_resume_is_bit_identical(data, whole, tmp_path, monkeypatch, variant):
    """Interrupted after these updates and resumed, a run ends as if nothing had been. Its progress
    bar counts what came again before it was interrupted."""
    broken, bars, new_bar = tmp_path / "broken", [], run_module.progress_bar
    monkeypatch.setattr(run_module, "progress_bar",
                        lambda *counts: bars.append(counts) or new_bar(*counts))
    stopping_after((1, 5, 8), monkeypatch)
    assert run(start(data, broken, VARIANTS[variant])) == 130
    for _ in range(2):
        assert run(["--resume", "--out", broken]) == 130
    assert run(["--resume", "--out", broken]) == 0
    assert same(outcome(broken), whole[variant])
    if variant == "again":
        assert bars == [(3, 0), (3, 1), (6, 5), (9, 8)]


def test_a_run_that_is_not_learned_goes_on(whole):
    """For as many updates again, five times at most; the rate begins anew each time. With
    --no-again, or what is learned, it does not."""
    *_, found = whole["again"]
    assert [e["update"] for e in found if e["event"] == "again"] == [3, 6, 9, 12, 15]
    assert [e["updates"] for e in found if e["event"] == "test"] == [18, 18]
    assert not [e for e in whole["plain"][-1] if e["event"] == "again"]
    for valid, backs, more in ((0.97, 0, 5), (0.98, 0, 0), (0.0, 4, 5), (0.0, 5, 0)):
        at, added = dict(done=5, valid=valid, backs=backs), []
        a_run = SimpleNamespace(at=at, lengthen=added.append, say=str, log=lambda *_, **__: None)
        schedule.once_more(a_run, 5)
        assert (at["backs"], added) == (backs + (more > 0), [more] if more else [])
    assert not codi.parse_flags(["--table"])[0].again and codi.parse_flags([])[0].again
    assert not codi.parse_flags(["--recipe", "gsm8k"])[0].again


@pytest.mark.parametrize("more", [
    "--method cot", "--method no-cot", "--n-latent 0", "--no-projection", "--beta 0", "--gamma 0",
    "--keep-last-step", "--kd l2 --no-kd-normalize", "--distill-at The"])
def test_every_ablation_runs(data, tmp_path, capsys, more):
    assert run(start(data, tmp_path / "run", more)) == 0
    tests = [line for line in metrics(tmp_path / "run") if line["event"] == "test"]
    assert len(tests) == (1 if "--method" in more else 2)
    assert "ms, batch 1" in capsys.readouterr().out


@pytest.mark.parametrize("method", ["cot", "no-cot"])
def test_a_baseline_has_no_projection(data, tmp_path, capsys, method):
    """None is built, counted, or saved; a checkpoint of former versions, which saved one that was
    never used, is evaluated, resumed from and started from as before."""
    out, more = tmp_path / "run", f"--method {method}"
    assert run(start(data, out, more)) == 0
    text = capsys.readouterr().out
    best = torch.load(out / "best.pt", weights_only=True)
    n = sum(p.numel() for p in best["model"].values())
    assert best["projection"] == {} and "learn with the projection's" not in text
    learned = re.search(r"([\d.]+) M learn", text)
    assert learned is None or learned[1] == f"{n / 1e6:.2f}"
    former = codi.make_projection(codi_flags(), 16).state_dict()
    torch.save(best | dict(projection=former), tmp_path / "former.pt")
    found = []
    for path in (out / "best.pt", tmp_path / "former.pt"):
        s = codi.trained_model(path, {})
        assert not list(s.projection.parameters())
        examples = codi.examples_of(s, "test", data_prep.load(data)["test"])
        found.append(codi.think_and_answer(s, codi.sides(s, examples)[method])[0])
        assert run(["--eval-only", path]) == 0
    assert found[0] == found[1]
    assert run(start(data, tmp_path / "next", f"{more} --init {tmp_path / 'former.pt'}")) == 0
    assert torch.load(tmp_path / "next" / "best.pt", weights_only=True)["projection"] == {}


def test_an_unfinished_baseline_of_former_versions(data, tmp_path, capsys, monkeypatch):
    """Its optimizer has the projection, too: --resume refuses in a sentence what it cannot go on
    with."""
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        stopping_after([5], patch)
        assert run(start(data, out, "--method cot")) == 130
    last = torch.load(out / "last.pt", weights_only=True)
    groups = last["optimizers"][-1]["param_groups"]
    groups.append(groups[-1] | dict(params=[1000, 1001]))
    torch.save(last, out / "last.pt")
    capsys.readouterr()
    assert run(["--resume", "--out", out]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("codi.py: ") and "--overwrite" in error and str(out) in error


def test_a_projection_is_counted(data, tmp_path, capsys):
    """A student's is built, learned, counted among what learns, and saved."""
    assert run(start(data, tmp_path / "run", "--n-embd 64")) == 0
    best = torch.load(tmp_path / "run" / "best.pt", weights_only=True)
    n = sum(p.numel() for part in ("model", "projection") for p in best[part].values())
    assert f", {n / 1e6:.2f} M learn with the projection's" in capsys.readouterr().out
    assert len(best["projection"]) == 6


LEFT_OUT = "CODI's projection is left out"


@pytest.mark.parametrize("more, taken", [
    ("", True), ("--lora-r 2 --optimizer adamw", True), ("--no-projection", False),
    ("--method cot", False)])
def test_start_from_a_codi_checkpoint(codi_run, data, tmp_path, capsys, more, taken):
    """--init takes its projection over, as its weights: at a negligible rate it stays. Where there
    is no use for it, that is said."""
    capsys.readouterr()
    before = torch.load(codi_run / "best.pt", weights_only=True)
    argv = start(data, tmp_path / "run",
                 f"--init {codi_run / 'best.pt'} --lr 1e-30 --weight-decay 0 --steps 3 {more}")
    assert run(argv) == 0
    after = torch.load(tmp_path / "run" / "best.pt", weights_only=True)
    assert same(after["projection"], before["projection"] if taken else {})
    assert same(after["model"], before["model"])
    assert (LEFT_OUT in capsys.readouterr().out) != taken


def test_coconut_leaves_the_projection_out(codi_run, data, tmp_path, capsys):
    """coconut.py has no projection, and says so of a model that was trained with one, but not of
    one without."""
    for name, told in (("best.pt", True), ("without.pt", False)):
        state = torch.load(codi_run / "best.pt", weights_only=True)
        torch.save(state | dict(projection={}), codi_run / "without.pt")
        capsys.readouterr()
        argv = test_runs.start(data, tmp_path / name, f"--init {codi_run / name}")
        assert test_runs.run(argv) == 0
        assert (LEFT_OUT in capsys.readouterr().out) == told


@pytest.mark.parametrize("more", ["", "--method cot", "--lora-r 2 --optimizer adamw --gamma 0"])
def test_compile_compiles_every_pass(codi_run, data, tmp_path, monkeypatch, more):
    """With --compile no pass of a model is an uncompiled one: in training, of thoughts and tokens
    at decoding, of the frozen teacher, in the report of the best model, with --eval-only and --ask;
    without it, none is compiled."""
    counts, out = Compiled(monkeypatch), tmp_path / "run"
    if more == "":
        more = f"--teacher {codi_run / 'best.pt'}"
    assert run(start(data, out, more + " --compile")) == 0
    passes, compiled = counts.taken()
    assert passes == compiled and set(passes) == {True, False}
    for asked in ([], ["--ask", "Ann has 3 pens. How many pens does Ann have?"]):
        assert run(["--eval-only", out / "best.pt", "--compile", *asked]) == 0
        passes, compiled = counts.taken()
        assert passes == compiled and len(passes) > 2
        assert run(["--eval-only", out / "best.pt", "--no-compile", *asked]) == 0
        passes, compiled = counts.taken()
        assert passes and not compiled


def test_static_teacher(data, tmp_path, capsys):
    """A frozen model distils; one of another shape is refused."""
    teacher = tmp_path / "teacher"
    assert run(start(data, teacher, "--method cot --no-keep-last-step")) == 0
    before = (teacher / "best.pt").read_bytes()
    more = f"--teacher {teacher / 'best.pt'}"
    assert run(start(data, tmp_path / "student", f"--gamma 0 {more}")) == 0
    assert (teacher / "best.pt").read_bytes() == before
    capsys.readouterr()
    assert run(start(data, tmp_path / "wide", f"--n-embd 32 {more}")) == 2
    assert "width" in capsys.readouterr().err and not (tmp_path / "wide" / "best.pt").exists()


ICOT = dict(method="icot", thoughts="keep", mean=30.1, std=0.5, tokens=2.2, seconds_batch_1=0.01)


def write_table(path, script, *rows):
    """A table.json as --table writes it."""
    path.write_text(json.dumps(dict(script=script, rows=rows)))
    return path


def test_table_resumes_and_takes_coconuts_rows(data, tmp_path, capsys):
    beside = write_table(tmp_path / "coconut.json", "coconut.py", ICOT)
    argv = start(data, tmp_path / "table", "--table --rows codi,no-kd,static-teacher --seeds 1 "
                                           f"--beside {beside}")
    assert run(argv) == 0
    first = capsys.readouterr().out
    assert "| icot (coconut.py) | 30.1" in first and "| static-teacher |" in first
    assert "validation after updates" in first
    stamps = {p: p.stat().st_mtime_ns for p in (tmp_path / "table").rglob("best.pt")}
    assert len(stamps) == 4 and run(argv) == 0
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps
    rows = json.loads((tmp_path / "table" / "table.json").read_text())["rows"]
    own = [r["method"] for r in rows if r["thoughts"] == "keep"]
    assert own == ["teacher", "codi", "no-kd", "static-teacher"]
    for content in ("{}", json.dumps(dict(rows=[ICOT | dict(accuracy=["a"])]))):
        beside.write_text(content)
        assert run(argv) == 2 and "--beside" in capsys.readouterr().err


def test_beside_reads_several_tables(tmp_path):
    """Rows of coconut.py's, of codi.py's and of an old table without its script, in this order."""
    kept = write_table(tmp_path / "a.json", "coconut.py", ICOT, ICOT | dict(thoughts="swap"))
    other = write_table(tmp_path / "b.json", "codi.py", dict(
        method="codi", accuracy=[90.0, 92.0], mean=91.0, tokens=5, seconds_batch_1=0.02,
        more={"svamp, %": "12.0"}))
    (tmp_path / "c.json").write_text(json.dumps(dict(rows=[ICOT])))
    rows = tables.read_tables(f"{kept},{other},{tmp_path / 'c.json'}")
    assert [row["method"] for row in rows] == [
        "icot (coconut.py)", "icot, thoughts swap (coconut.py)", "codi (codi.py)",
        f"icot ({tmp_path / 'c.json'})"]
    text = "\n".join(tables.markdown(rows))
    assert "| icot (coconut.py) | 30.1 | 2.2 | 10.0 |" in text
    assert "| codi (codi.py) | 91.0 ± 1.4 | 5.0 | 20.0 | 12.0 |" in text


@pytest.mark.parametrize("script", ["coconut.py", "codi.py"])
def test_two_tables_beside_a_table(data, tmp_path, capsys, script):
    """--beside with a comma adds the rows of both files, in either script."""
    a = write_table(tmp_path / "a.json", "coconut.py", ICOT)
    b = write_table(tmp_path / "b.json", "codi.py", ICOT | dict(method="l2", mean=44.4))
    more = f"--table --seeds 1 --beside {a},{b}"
    if script == "codi.py":
        assert run(start(data, tmp_path / "t", more + " --rows no-cot")) == 0
    else:
        assert test_runs.run(test_runs.start(data, tmp_path / "t", more + " --methods no-cot")) == 0
    for text in (capsys.readouterr().out, (tmp_path / "t" / "table.md").read_text()):
        assert "| icot (coconut.py) | 30.1 |" in text and "| l2 (codi.py) | 44.4 |" in text


@pytest.mark.parametrize("content", ["{}", "[1]", "no JSON", '{"rows": [{"method": "x"}]}', None])
def test_a_bad_table_beside_is_refused_before_training(data, tmp_path, capsys, monkeypatch,
                                                       content):
    """What --beside names is read before hours of training, not after them."""
    good, bad = write_table(tmp_path / "good.json", "coconut.py", ICOT), tmp_path / "bad.json"
    if content is not None:
        bad.write_text(content)
    monkeypatch.setattr(codi, "codi_loss", None)
    argv = start(data, tmp_path / "t", f"--table --rows codi --seeds 1 --beside {good},{bad}")
    assert run(argv) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("codi.py: --beside") and str(bad) in error
    assert str(good) not in error


def test_eval_only_and_ask(data, tmp_path, capsys):
    assert run(start(data, tmp_path / "run")) == 0
    table = capsys.readouterr().out.splitlines()
    best = tmp_path / "run" / "best.pt"
    assert run(["--eval-only", best]) == 0
    again = capsys.readouterr().out.splitlines()
    found = []
    for lines in (table, again):
        found.append([line.split("%")[0].split()[-2:] for line in lines if " %" in line])
    assert found[0][-2:] == found[1][-2:]
    question = "Ned has 3 pens. How many pens does Ned have?"
    assert run(["--eval-only", best, "--ask", question]) == 0
    out = capsys.readouterr().out
    assert out.count("thought ") == 2 and "student: " in out and "in words: " in out


def test_released_weights_with_lora(data, tmp_path, gpt2_tokenizer):
    path = tmp_path / "pytorch_model.bin"
    torch.save(weights(vocab_size=258, n_positions=300), path)
    more = f"--init {path} --lora-r 2 --optimizer adamw --no-train-marks"
    assert run(start(data, tmp_path / "run", more)) == 0
    state = torch.load(tmp_path / "run" / "best.pt", weights_only=True)["model"]
    assert not any("linear" in name for name in state) and state["wte.weight"].shape == (261, 32)


@pytest.mark.parametrize("more, word", [
    ("--digits-only", "begins with a digit"),
    ("--init nowhere.bin --optimizer adamw", "nowhere.bin"),
    ("--teacher nowhere.pt", "nowhere.pt"), ("--block-size 20", "block_size")])
def test_refuses_with_one_sentence(tmp_path, capsys, gpt2_tokenizer, more, word):
    item = dict(question="Is Bob a cat?", steps=["Bob is a dog.", "Every dog is a cat."],
                answer="yes")
    data_prep.write_dataset(tmp_path / "words", {
        split: [item | dict(question=f"{split}? " + item["question"])] for split in SPLITS})
    assert run(start(tmp_path / "words", tmp_path / "run", more)) == 2
    err = capsys.readouterr().err.strip().splitlines()
    assert word in err[-1] and "Traceback" not in "".join(err)


def test_coconut_refuses_codis_checkpoint_and_the_other_way(codi_run, finished, capsys):
    assert run(["--eval-only", finished["plain"] / "best.pt"]) == 2
    assert "coconut.py" in capsys.readouterr().err
    assert test_runs.run(["--eval-only", codi_run / "best.pt"]) == 2
    assert "codi.py" in capsys.readouterr().err


def test_overfit(data, tmp_path):
    """A student learns 24 problems by heart: the loss does what it should."""
    more = "--n-embd 32 --n-head 2 --lr 2e-2 --batch-size 24 --steps 60 --eval-every 60"
    assert run(start(data, tmp_path / "run", more)) == 0
    losses = [line["loss"] for line in metrics(tmp_path / "run") if line["event"] == "train"]
    assert losses[-1] < 0.25 * losses[0]


def test_soft_thinking_takes_a_codi_model(codi_run, data, tmp_path, capsys):
    """Its teacher thinks in words until 'The answer is:'."""
    import probe_soft
    import soft_thinking
    argv = ["--model", codi_run / "best.pt", "--data", data, "--mode", "greedy", "--n", "4",
            "--max-think", "12", "--max-new", "8", "--out", tmp_path / "soft"]
    assert not soft_thinking.main(probe_soft, list(map(str, argv)))
    assert "greedy" in capsys.readouterr().out
