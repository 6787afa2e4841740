"""codi.py: what teacher and student read, where they are compared, what learns; whole runs on tiny data."""

import json
import os
import signal
import sys

import pytest
import torch
import torch.nn.functional as F

import codi
import data_prep
import runtime
from gpt2 import GrowingCache
from test_runs import data, gpt2_tokenizer, metrics, same, signals       # noqa: F401 (fixtures)
from tiny import codi_flags, tiny_model, weights

BOT, EOT, EOS, PAD = 64, 65, 62, 63
QUESTION, STEPS, ANSWER = [1, 2, 3], [[10, 11], [20], [30, 31]], [7, 8, 9, 40, EOS]
SMALL = ("--device cpu --dtype float32 --n-layer 1 --n-head 2 --n-embd 16 --n-latent 2 --batch-size 4 --steps 11 "
         "--eval-every 4 --eval-items 4 --max-new 10 --save-every 3 --ood none")


@pytest.fixture
def tok(tok):
    """Tokens 7 8 9 are "The answer is:"."""
    tok.decode = lambda ids: codi.PROMPT if ids == [7, 8, 9] else "x" * len(ids)
    return tok


@pytest.fixture
def pairs(examples, tok):
    answered = [e._replace(answer=[7, 8, 9] + e.answer) for e in examples]
    return codi.Pairs(data_prep.Examples(data_prep.Examples.pack(answered)), codi_flags(), tok, "here")


@pytest.fixture
def projection():
    torch.manual_seed(1)
    return codi.make_projection(codi_flags(), 32)


# ---------------------------------------------------------------- what is read

@pytest.mark.parametrize("method, keep, words", [("codi", False, [10, 11, 20]), ("codi", True, [10, 11, 20, 30, 31]),
                                                 ("cot", True, [10, 11, 20, 30, 31]), ("cot", False, [10, 11, 20]), ("no-cot", False, [])])
def test_sequences(tok, method, keep, words):
    student, teacher = codi.sequences((QUESTION, STEPS, ANSWER), codi_flags(method=method, keep_last_step=keep), tok)
    assert student == ([1, 2, 3, BOT], 3, [EOT, *ANSWER])
    assert teacher == ([1, 2], 0, [3, *words, *ANSWER])


def test_an_example_without_steps(tok):
    _, teacher = codi.sequences((QUESTION, [], ANSWER), codi_flags(), tok)
    assert teacher.language == [3, *ANSWER]


@pytest.fixture(scope="module")
def words_tok():
    items = data_prep.chains((400, 1, 1))["train"]
    return data_prep.Tokenizer.compact("\n".join([d["question"], *d["steps"], codi.PROMPT + d["answer"]]) for d in items)


@pytest.mark.parametrize("pattern", ["numbers-apart", "gpt2", "is-a"])
@pytest.mark.parametrize("question, steps, answer", [
    ("How many?", ["<<1+1=2>>", "<<2+3=5>>"], "5"),
    ("The answer is: not here. How many?", ["The answer is: wrong.", "<<2+3=5>>"], "5"),        # the prompt stands thrice
    ("How many?", ["<<1-6=-5>>"], "-5"), ("How many?", [], "1,450"), ("How many?", [], "$4.50"),
    ("Is Bob a cat?", ["Bob is a cat."], "Bob is a cat."), ("How many?", [], "The answer is: 5")])
def test_the_colon(pattern, question, steps, answer):
    """Student and teacher are compared at the token that ends the prompt: what comes after it is the answer."""
    items = [dict(question=question, steps=steps, answer=answer)]
    tok = data_prep.Tokenizer.compact([question + "\n" + "\n".join(steps) + "\n" + codi.PROMPT + answer], pattern)
    pairs = codi.Pairs(data_prep.tokenize(items, tok, 1000, 8, "here", codi.PROMPT), codi_flags(), tok, "here")
    for side, column in zip(pairs[0], pairs.colon[0]):
        assert side.language[-1] == tok.eos
        rest = side.language[column + 1:-1]
        assert tok.decode(rest).strip() == answer and tok.decode(side.language[:column + 1]).rstrip().endswith("The answer is:")
    assert pairs[0][0].language[:1] == [tok.eot]


@pytest.mark.parametrize("at, last", [("The", "The"), ("The answer is", " is")])
def test_other_distill_tokens(words_tok, at, last):
    items = [dict(question="How many?", steps=["<<1+1=2>>"], answer="2")]
    pairs = codi.Pairs(data_prep.tokenize(items, words_tok, 1000, 8, "here", codi.PROMPT), codi_flags(distill_at=at), words_tok, "here")
    for side, column in zip(pairs[0], pairs.colon[0]):
        assert words_tok.decode([side.language[column]]) == last


def test_absent_prompt_names_the_item(words_tok):
    one, other = data_prep.tokenize([dict(question="How many?", steps=[], answer=a) for a in "12"], words_tok, 100, 8, "here", codi.PROMPT)
    other = other._replace(answer=words_tok.encode("So it is 2") + [words_tok.eos])
    examples = data_prep.Examples(data_prep.Examples.pack([one, other]))
    with pytest.raises(runtime.UserError, match="train.json, item 2: .*So it is 2"):
        codi.Pairs(examples, codi_flags(), words_tok, "train.json")


# ---------------------------------------------------------------- the loss

def test_projected_state_is_fed_back(model, projection):
    """Thought i + 1 reads the projection of the state at thought i; --no-projection reads the state itself."""
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
    thoughts = codi.make_projection(codi_flags(thought_std=std), 32)(3 * torch.randn(8, 32))
    assert torch.allclose(thoughts.std(-1, correction=0), torch.full((8,), std), rtol=0.01)


def test_no_thoughts(model, projection):
    x = model.wte(torch.tensor([[5, 6, BOT]]))
    left, _, states = codi.think(model, projection, GrowingCache(), x, None, 0)
    assert left is x and states.shape == (1, 0, 32)


def test_question_read_once_is_question_read_twice(model, projection, pairs, tok):
    """The shared prefix changes nothing: the same losses as of two whole sequences."""
    student, teacher, colon = pairs.batch(range(5), PAD, "cpu")
    _, parts = codi.codi_loss(model, projection, student, teacher, colon, codi_flags())
    for i in range(5):
        s, t = pairs[i]
        x = model.wte(torch.tensor([s.prompt]))
        for _ in range(3):
            x = torch.cat([x, projection(model(embeds=x)[:, -1:])], 1)
        thought = model(embeds=torch.cat([x, model.wte(torch.tensor([s.language]))], 1), all_states=True)
        said = model(torch.tensor([t.prompt + t.language]), all_states=True)
        at = [torch.stack([h[:, -len(side.language):][:, c] for h in states]) for states, side, c in
              zip((thought, said), (s, t), pairs.colon[i])]
        _, one = codi.codi_loss(model, projection, *pairs.batch([i], PAD, "cpu"), codi_flags())
        assert one["kd"].item() == pytest.approx(codi.distance(*at).item(), rel=1e-4)
        logits = model.head(thought[-1][0, -len(s.language):-1])
        assert one["student"].item() == pytest.approx(F.cross_entropy(logits, torch.tensor(s.language[1:])).item(), rel=1e-4)
        parts["kd"] = parts["kd"] - one["kd"] / 5
    assert abs(parts["kd"].item()) < 1e-5                    # a batch's is the mean of its rows'


def gradients(model, projection, loss):
    grads = torch.autograd.grad(loss, [*model.parameters(), *projection.parameters()], retain_graph=True, allow_unused=True)
    return [torch.zeros(1) if g is None else g for g in grads]


def test_stop_gradient(model, projection, pairs):
    """L_KD has the gradient that it has with a frozen copy as teacher: none goes through the teacher's pass."""
    batch = pairs.batch(range(5), PAD, "cpu")
    _, parts = codi.codi_loss(model, projection, *batch, codi_flags())
    _, frozen = codi.codi_loss(model, projection, *batch, codi_flags(), static=tiny_model().requires_grad_(False))
    assert parts["kd"].item() == pytest.approx(frozen["kd"].item(), rel=1e-5)
    ours, theirs = (gradients(model, projection, p["kd"]) for p in (parts, frozen))
    assert any(g.abs().sum() > 0 for g in ours)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(ours, theirs))


def test_gradient_reaches_the_question_through_the_thoughts(model, projection, pairs):
    """L_student alone moves the embedding of a token that only the question has, and the projection."""
    _, parts = codi.codi_loss(model, projection, *pairs.batch([1], PAD, "cpu"), codi_flags())
    grads = gradients(model, projection, parts["student"])
    only = set(pairs[1][0].prompt) - set(pairs[1][0].language)
    assert all(grads[0][token].abs().sum() > 0 for token in only)
    assert all(g.abs().sum() > 0 for g in grads[-6:])


def test_gamma_0_does_not_teach_the_teacher(model, projection, pairs):
    """Without its loss, words that only the teacher reads get no gradient."""
    batch = pairs.batch([0], PAD, "cpu")
    for gamma, learns in ((0.0, False), (1.0, True)):
        loss, _ = codi.codi_loss(model, projection, *batch, codi_flags(gamma=gamma, alpha=0.0, beta=0.0))
        assert loss.requires_grad
        grads = gradients(model, projection, loss)
        assert (sum(g.abs().sum() for g in grads) > 0) == learns


@pytest.mark.parametrize("kind, normalize, expected", [
    ("l1", False, 1.5), ("l2", False, 2.5), ("smooth-l1", False, 1.0), ("l1", True, 1.5 / 2 ** 0.5), ("smooth-l1", True, 1.0 / 2 ** 0.5)])
def test_distance_by_hand(kind, normalize, expected):
    """Differences 1 and 2; the teacher's state (0, 2) has the standard deviation sqrt 2."""
    student, teacher = torch.tensor([[[1.0, 4.0]]]), torch.tensor([[[0.0, 2.0]]])
    assert codi.distance(student, teacher, kind, normalize).item() == pytest.approx(expected)


# ---------------------------------------------------------------- decoding

@pytest.mark.parametrize("side", [0, 1], ids=["student", "teacher"])
def test_batch_answers_as_one_by_one(model, projection, pairs, tok, machine, side):
    rows, flags = [pair[side] for pair in pairs], codi_flags()
    together, states = codi.answer(model, projection.eval(), rows, tok, flags, machine)
    for i, row in enumerate(rows):
        alone, own = codi.answer(model, projection, [row], tok, flags, machine)
        assert alone == [together[i]] and torch.allclose(own[0], states[i], atol=1e-4)
        x = model.wte(torch.tensor([row.prompt])) if row.prompt else torch.zeros(1, 0, 32)      # and without a cache
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


def trained_lora(pairs, tok, projection, **changed):
    flags, model = codi_flags(**LORA | changed), tiny_model()
    codi.add_lora(model, flags, tok)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    optimizers = codi.new_optimizers(model, projection, flags)
    for _ in range(3):
        loss, _ = codi.codi_loss(model, projection, *pairs.batch(range(5), PAD, "cpu"), flags)
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        model.zero_grad(), projection.zero_grad()
    return model, before, flags


def test_lora_starts_as_the_model_was(pairs, tok, projection):
    model, plain = tiny_model(), tiny_model()
    codi.add_lora(model, codi_flags(**LORA), tok)
    ids = torch.tensor([[1, 2, 3, 4]])
    assert torch.equal(model(ids), plain(ids))


@pytest.mark.parametrize("marks", [True, False])
def test_only_lora_projection_and_chosen_rows_change(pairs, tok, projection, marks):
    was = {k: v.clone() for k, v in projection.state_dict().items()}
    model, before, _ = trained_lora(pairs, tok, projection, train_marks=marks)
    changed = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    lora = {f"h.{i}.{name}.{side}" for i in range(3) for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj") for side in "ab"}
    assert changed == lora | ({"wte.weight"} if marks else set())
    rows = (model.wte.weight != before["wte.weight"]).any(1).nonzero().flatten().tolist()
    assert rows == ([BOT, EOT] if marks else [])
    assert all(not torch.equal(v, was[k]) for k, v in projection.state_dict().items())


def test_merged_is_unmerged(pairs, tok, projection, machine):
    """The plain GPT-2 that is saved answers as the model with LoRA beside it."""
    model, _, flags = trained_lora(pairs, tok, projection)
    plain = tiny_model()
    plain.load_state_dict(codi.merged(model.state_dict(), vars(flags)))
    ids = torch.tensor([[1, 2, 3, 4, BOT]])
    assert not torch.allclose(plain(ids), tiny_model()(ids), atol=1e-2)
    assert torch.allclose(plain(ids), model(ids), atol=1e-4)


# ---------------------------------------------------------------- schedule and flags

def test_cosine():
    rates = [codi.cosine(i, 100, 2.0, 10) for i in range(100)]
    assert rates[0] == 0.2 and rates[9] == 2.0 == max(rates) and rates[55] == pytest.approx(1.0) and 0 < rates[99] < 0.01
    assert rates[10:] == sorted(rates[10:], reverse=True)


def test_trapezoid():
    rates = [codi.SCHEDULES["trapezoid"](i, 100, 2.0, 10) for i in range(100)]
    assert rates[0] == 0.2 and rates[9:70] == [2.0] * 61 and rates[85] == pytest.approx(1.0) and rates[99] == pytest.approx(2 / 30)


def test_recipe_is_the_papers():
    flags, _ = codi.parse_flags(["--recipe", "gsm8k"])
    assert (flags.epochs, flags.lr, flags.batch_size, flags.lora_r, flags.lora_alpha, flags.lora_dropout, flags.n_latent) == (
        40, 3e-3, 128, 128, 32, 0.1, 6)
    assert (flags.warmup, flags.weight_decay, flags.grad_clip, flags.alpha, flags.beta, flags.gamma) == (0.03, 0.1, 2.0, 1, 1, 1)
    assert flags.init == "gpt2" and flags.kd == "smooth-l1" and flags.thought_std == 1 and flags.kd_normalize
    assert not flags.keep_last_step and flags.digits_only


@pytest.mark.parametrize("argv, word", [
    ("--distill-at answer", "no beginning"), ("--rows codi,nonsense", "nonsense"), ("--lora-r 4 --optimizer muon", "adamw"),
    ("--steps 3 --epochs 1", "exclude"), ("--n-embd 10 --n-head 3", "multiple"), ("--ask hello", "--eval-only"),
    ("--teacher x.pt --method cot", "no student"), ("--table --resume", "--table"), ("--init gpt2 --tokenizer compact", "--tokenizer"),
    ("--alpha -1", "between"), ("--n-latent x", "whole number"), ("--kd l3", "invalid choice")])
def test_bad_flags(argv, word, capsys):
    with pytest.raises(SystemExit) as stop:
        codi.parse_flags(argv.split())
    assert stop.value.code == 2 and word in capsys.readouterr().err


# ---------------------------------------------------------------- runs

def run(argv):
    """`python codi.py ARGV` in this process; returns the exit code."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(sys, "argv", ["codi.py", *map(str, argv)])
        runtime.run_main(codi.main, data_prep.DataError)
    return stop.value.code or 0


def start(data, out, more=""):
    return ["--data", data, "--out", out, *SMALL.split(), *more.split()]


VARIANTS = {"plain": "--dropout 0.1 --projection-dropout 0.1 --optimizer muon", "lora": "--lora-r 3 --lora-dropout 0.1 --optimizer adamw"}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("stops", [(5,), (1, 8)])
def test_resume_is_bit_identical(data, tmp_path, monkeypatch, variant, stops):
    """Interrupted after these updates and resumed, a run ends as if nothing had been."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert run(start(data, whole, VARIANTS[variant])) == 0
    step = runtime.Progress.step

    def stopping(self, *args, **where):
        step(self, *args, **where)
        if self.at["done"] in stops:
            os.kill(os.getpid(), signal.SIGINT)
    monkeypatch.setattr(runtime.Progress, "step", stopping)
    assert run(start(data, broken, VARIANTS[variant])) == 130
    for _ in stops[1:]:
        assert run(["--resume", "--out", broken]) == 130
    assert run(["--resume", "--out", broken]) == 0
    results = []
    for out in (whole, broken):
        best, last = (torch.load(out / name, weights_only=True) for name in ("best.pt", "last.pt"))
        results.append((best["model"], best["projection"], last["model"], metrics(out)))
    assert same(*results)


@pytest.mark.parametrize("more", ["--method cot", "--method no-cot", "--n-latent 0", "--no-projection", "--beta 0", "--gamma 0",
                                  "--keep-last-step", "--kd l2 --no-kd-normalize", "--distill-at The"])
def test_every_ablation_runs(data, tmp_path, capsys, more):
    assert run(start(data, tmp_path / "run", more)) == 0
    lines = metrics(tmp_path / "run")
    assert [line["event"] for line in lines if line["event"] == "test"] == ["test"] * (1 if "--method" in more else 2)
    assert "ms, batch 1" in capsys.readouterr().out


def test_static_teacher(data, tmp_path, capsys):
    """A frozen model distils; one of another shape is refused."""
    teacher = tmp_path / "teacher"
    assert run(start(data, teacher, "--method cot --no-keep-last-step")) == 0
    before = (teacher / "best.pt").read_bytes()
    assert run(start(data, tmp_path / "student", f"--gamma 0 --teacher {teacher / 'best.pt'}")) == 0
    assert (teacher / "best.pt").read_bytes() == before
    capsys.readouterr()
    assert run(start(data, tmp_path / "wide", f"--n-embd 32 --teacher {teacher / 'best.pt'}")) == 2
    assert "width" in capsys.readouterr().err and not (tmp_path / "wide" / "best.pt").exists()


def test_table_resumes_and_takes_coconuts_rows(data, tmp_path, capsys):
    beside = tmp_path / "coconut.json"
    row = dict(method="icot", thoughts="keep", mean=30.1, std=0.5, tokens=2.2, seconds_batch_1=0.01)
    beside.write_text(json.dumps(dict(rows=[row])))
    argv = start(data, tmp_path / "table", f"--table --rows codi,no-kd,static-teacher --seeds 2 --beside {beside}")
    assert run(argv) == 0
    first = capsys.readouterr().out
    assert "| icot (coconut.py) | 30.1" in first and "| static-teacher |" in first and "validation after updates" in first
    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "table").rglob("best.pt")}
    assert len(stamps) == 8 and run(argv) == 0
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps
    rows = json.loads((tmp_path / "table" / "table.json").read_text())["rows"]
    assert [r["name"] for r in rows] == ["teacher", "codi", "no-kd", "static-teacher"]
    beside.write_text("{}")
    assert run(argv) == 2 and "--beside" in capsys.readouterr().err


def test_eval_only_and_ask(data, tmp_path, capsys):
    assert run(start(data, tmp_path / "run")) == 0
    table = capsys.readouterr().out.splitlines()
    best = tmp_path / "run" / "best.pt"
    assert run(["--eval-only", best]) == 0
    again = capsys.readouterr().out.splitlines()
    found = [[line.split("%")[0].split()[-2:] for line in lines if " %" in line] for lines in (table, again)]
    assert found[0][-2:] == found[1][-2:]
    assert run(["--eval-only", best, "--ask", "Ned has 3 pens. How many pens does Ned have?"]) == 0
    out = capsys.readouterr().out
    assert out.count("thought ") == 2 and "student: " in out and "in words: " in out


def test_released_weights_with_lora(data, tmp_path, gpt2_tokenizer):
    path = tmp_path / "pytorch_model.bin"
    torch.save(weights(vocab_size=258, n_positions=300), path)
    assert run(start(data, tmp_path / "run", f"--init {path} --lora-r 2 --optimizer adamw --no-train-marks")) == 0
    state = torch.load(tmp_path / "run" / "best.pt", weights_only=True)["model"]
    assert not any("linear" in name for name in state) and state["wte.weight"].shape == (261, 32)


@pytest.mark.parametrize("more, word", [("--digits-only", "begins with a digit"), ("--init nowhere.bin --optimizer adamw", "nowhere.bin"),
                                        ("--teacher nowhere.pt", "nowhere.pt"), ("--block-size 20", "block_size")])
def test_refuses_with_one_sentence(tmp_path, capsys, gpt2_tokenizer, more, word):
    item = dict(question="Is Bob a cat?", steps=["Bob is a dog.", "Every dog is a cat."], answer="yes")
    data_prep.write_dataset(tmp_path / "words", {s: [item | dict(question=f"{s}? " + item["question"])] for s in data_prep.SPLITS})
    assert run(start(tmp_path / "words", tmp_path / "run", more)) == 2
    err = capsys.readouterr().err.strip().splitlines()
    assert word in err[-1] and "Traceback" not in "".join(err)


def test_coconut_refuses_codis_checkpoint_and_the_other_way(data, tmp_path, capsys):
    import coconut
    from test_runs import run as run_coconut, start as start_coconut
    assert run(start(data, tmp_path / "codi")) == 0 and run_coconut(start_coconut(data, tmp_path / "coconut")) == 0
    capsys.readouterr()
    assert run(["--eval-only", tmp_path / "coconut" / "best.pt"]) == 2 and "coconut.py" in capsys.readouterr().err
    assert run_coconut(["--eval-only", tmp_path / "codi" / "best.pt"]) == 2 and "codi.py" in capsys.readouterr().err


def test_overfit(data, tmp_path):
    """A student learns 24 problems by heart: the loss does what it should."""
    assert run(start(data, tmp_path / "run", "--n-embd 32 --n-head 2 --lr 1e-2 --batch-size 24 --steps 120 --eval-every 120")) == 0
    losses = [line["loss"] for line in metrics(tmp_path / "run") if line["event"] == "train"]
    assert losses[-1] < 0.25 * losses[0]


def test_soft_thinking_takes_a_codi_model(data, tmp_path, capsys):
    """Its teacher thinks in words until 'The answer is:'."""
    import soft_thinking
    assert run(start(data, tmp_path / "run")) == 0
    assert soft_thinking.main(["--model", str(tmp_path / "run" / "best.pt"), "--data", str(data), "--mode", "greedy", "--n", "4",
                               "--max-think", "12", "--max-new", "8", "--out", str(tmp_path / "soft")]) == 0
    assert "greedy" in capsys.readouterr().out
