"""coconut.py: the curriculum, the loop of thoughts, its gradients, batching, schedule and flags."""

import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import coconut
from common import evaluation, schedule
from common.puzzles import chains
from common.text import Example, Sequence, batches, collate, tokenize
from tiny import decoding, setup_of, tiny_model

BOT, EOT, EOS, PAD = 64, 65, 62, 63


def sequences(examples, tok, stages, c=1, **more):
    """One Sequence per example and stage."""
    return [coconut.curriculum(e, s, c, 3, "coconut", tok, **more)
            for e, s in zip(examples, stages)]


def close(a, b, rtol=1e-4, atol=1e-5):
    return torch.allclose(a, b, rtol=rtol, atol=atol)


def gradients(model, loss):
    return torch.autograd.grad(loss, list(model.parameters()))


def naive(model, sequence, detach=False):
    """Coconut as its definition has it: no cache, the whole prefix computed anew for every thought.

    Returns the summed cross-entropy of one sequence, its number of labels, and the thoughts.
    """
    x = model.wte(torch.tensor([sequence.prompt]))
    for _ in range(sequence.n_latent):
        thought = model(embeds=x)[:, -1:]
        x = torch.cat([x, thought.detach() if detach else thought], 1)
    language = torch.tensor(sequence.language)
    h = model(embeds=torch.cat([x, model.wte(language)[None, :-1]], 1))[0, 1 - len(language):]
    loss = F.cross_entropy(model.head(h), language[1:], reduction="sum")
    return loss, len(language) - 1, x[0, len(sequence.prompt):]


def area(rows):
    """Positions of a batch of Sequences, padding included."""
    return len(rows) * sum(max(sizes) for sizes in zip(*(
        (len(q.prompt), q.n_latent, len(q.language)) for q in rows)))


# ---------------------------------------------------------------- batches of like length

def test_rows_are_cut_where_it_saves_most():
    """In at most two parts, which have less padding than any other cut of the rows by length."""
    rng = random.Random(0)
    for _ in range(200):
        rows = [Sequence([1] * rng.randint(1, 20), rng.randint(0, 4), [i] * rng.randint(1, 30))
                for i in range(rng.randint(1, 12))]
        order = sorted(rows, key=lambda q: len(q.language))
        cuts = [area(order[:i]) + area(order[i:]) for i in range(1, len(rows))]
        parts = list(schedule.alike([rows], saving=0))
        assert sorted(sum(parts, [])) == sorted(rows) and all(parts) and len(parts) <= 2
        assert sum(map(area, parts)) == min([area(rows), *cuts])
        thrifty = list(schedule.alike([rows], saving=0.2))
        assert len(thrifty) == 1 or sum(map(area, thrifty)) <= 0.8 * area(rows)


def test_padding_of_the_default_run(text_tok):
    """Under 10 % at every stage, with stage mixing as it is."""
    flags, _ = coconut.parse_flags([])
    items = chains((2000, 1, 1))["train"]
    examples = tokenize(items, text_tok, 128, 5, "here")
    for stage in range(4):
        order = batches(coconut.lengths(examples, stage, flags), 32, np.random.default_rng(0))
        padded = real = 0
        for k, chosen in enumerate(order):
            rng = np.random.default_rng(k)
            rows = [coconut.training_sequence(examples[i], stage, flags, text_tok, rng)
                    for i in chosen]
            parts = list(schedule.alike([rows]))
            padded += sum(map(area, parts))
            real += sum(area([q]) for q in rows)
        assert real / padded > 0.9


# ---------------------------------------------------------------- curriculum

def test_figure_2(tok):
    """The stages of the paper's figure, token by token, for the example with three steps."""
    example = Example([1, 2], [[10, 11], [20], [30, 31]], [40, EOS])

    def look(stage, **more):
        return tuple(coconut.curriculum(example, stage, 2, 3, "coconut", tok, **more))

    assert look(0) == ([1, 2, BOT], 0, [EOT, 10, 11, 20, 30, 31, 40, EOS])
    assert look(1) == ([1, 2, BOT], 2, [EOT, 20, 30, 31, 40, EOS])
    assert look(2) == ([1, 2, BOT], 4, [EOT, 30, 31, 40, EOS])
    assert look(3) == ([1, 2, BOT], 6, [EOT, 40, EOS])
    assert look(0, plain_stage_0=True) == ([1], 0, [2, 10, 11, 20, 30, 31, 40, EOS])
    assert look(1, plain_stage_0=True) == look(1)


@pytest.mark.parametrize("plain_stage_0", [False, True])
@pytest.mark.parametrize("n_steps", [0, 1, 2, 3, 5])
@pytest.mark.parametrize("c", [1, 2, 3])
@pytest.mark.parametrize("stage", range(5))
def test_coconut_curriculum(stage, c, n_steps, plain_stage_0, tok):
    """With stage_max 3: stage * c thoughts however many steps there are, at most 3 c; each step
    is left from the stage on at which it was not yet replaced, none in the extra stage 4."""
    steps = [[10 * i, 10 * i + 1] for i in range(1, n_steps + 1)]
    example = Example([1, 2, 3], steps, [7, EOS])
    before = Example(*map(list, example))
    prompt, n_latent, language = coconut.curriculum(example, stage, c, 3, "coconut", tok,
                                                    plain_stage_0)
    left = []
    for i in range(1, n_steps + 1):
        if stage < i and stage < 4:
            left += [10 * i, 10 * i + 1]
    assert n_latent == {0: 0, 1: c, 2: 2 * c, 3: 3 * c, 4: 3 * c}[stage]
    marks = [] if plain_stage_0 and stage == 0 else [BOT, EOT]
    assert prompt + language == [1, 2, 3, *marks, *left, 7, EOS]
    assert language == [(marks or [3])[-1], *left, 7, EOS]
    assert example == before


@pytest.mark.parametrize("n_steps", [0, 1, 3])
@pytest.mark.parametrize("stage", range(5))
def test_baseline_curriculum(stage, n_steps, tok):
    """cot keeps all steps, no-cot none, at every stage, both without thoughts and marks."""
    steps = [[10 * i] for i in range(1, n_steps + 1)]
    example = Example([1, 2, 3], steps, [7, EOS])

    def look(method):
        return coconut.curriculum(example, stage, 2, 3, method, tok)

    assert look("cot") == ([1, 2], 0, [3, *sum(steps, []), 7, EOS])
    assert look("no-cot") == ([1, 2], 0, [3, 7, EOS])


@pytest.mark.parametrize("pad", [PAD, EOS], ids=["pad", "eos-as-pad"])
@pytest.mark.parametrize("stages", [(0,) * 5, (2,) * 5, (3, 1, 0, 2, 4)], ids=str)
def test_labels_are_remaining_language_only(stages, pad, examples, tok):
    """The labels are each row's remaining steps and answer, in order: none on the question, <bot>,
    thoughts, <eot> or padding, also where padding looks like eos."""
    batch = collate(sequences(examples, tok, stages), pad)
    expected = []
    for e, s in zip(examples, stages):
        expected.append(sum(e.steps[s:] if s < 4 else [], []) + e.answer)
    assert batch.labels.tolist() == sum(expected, [])
    T = batch.language.size(1)
    row, column = batch.where // T, batch.where % T
    assert row.tolist() == [r for r, e in enumerate(expected) for _ in e]
    assert column.tolist() == [i for e in expected for i in range(len(e))]      # column 0: <eot>
    assert batch.language[:, 0].tolist() == [EOT] * 5
    assert batch.language[row, column + 1].tolist() == batch.labels.tolist()
    assert not {BOT, EOT, PAD} & set(batch.labels.tolist())


# ---------------------------------------------------------------- the loop of thoughts

@pytest.mark.parametrize("n_latent", [0, 1, 2, 6])
def test_the_hidden_state_is_fed_back(n_latent, model):
    """Each thought's input is the ln_f output before it, bit for bit; n thoughts cost n + 1
    passes."""
    rows = [Sequence([1, 2, BOT], n_latent, [EOT, 7, EOS]),
            Sequence([3, BOT], n_latent, [EOT, EOS])]
    inputs, outputs = [], []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: inputs.append(kwargs["embeds"]), with_kwargs=True)
    model.ln_f.register_forward_hook(lambda module, args, output: outputs.append(output))
    _, thoughts = coconut.coconut_loss(model, collate(rows, PAD))
    assert len(inputs) == n_latent + 1
    prompts = torch.tensor([[1, 2, BOT], [PAD, 3, BOT]])
    assert torch.equal(inputs[0][:, :3], model.wte.weight[prompts])
    for i in range(n_latent):
        assert torch.equal(inputs[i + 1][:, 0], outputs[i][:, -1])
        assert torch.equal(thoughts[:, i], outputs[i][:, -1])
        last = i + 1 == n_latent
        assert inputs[i + 1].size(1) == (1 + 3 if last else 1)          # 3: <eot> 7 eos


@pytest.mark.parametrize("stages", [(0,) * 5, (3,) * 5, (3, 1, 0, 2, 4)], ids=str)
@pytest.mark.parametrize("c", [1, 2])
def test_batch_equals_uncached_one_by_one(stages, c, model, examples, tok, machine):
    """Rows of different questions and numbers of thoughts in one batch have the loss (weighted by
    tokens), thoughts, gradients and answers of each computed by itself, without cache."""
    rows = sequences(examples, tok, stages, c)
    loss, thoughts = coconut.coconut_loss(model, collate(rows, PAD))
    alone = [naive(model, row) for row in rows]
    expected = sum(l for l, _, _ in alone) / sum(n for _, n, _ in alone)
    assert close(loss, expected)
    for row, ours, (_, _, theirs) in zip(rows, thoughts, alone):
        assert close(ours[:row.n_latent], theirs)
    names = dict(model.named_parameters())
    for name, a, b in zip(names, gradients(model, loss), gradients(model, expected)):
        assert close(a, b, 1e-3, 1e-5), name
    s = setup_of(model, tok, machine, decoding(12))
    answers, *_ = coconut.think_and_answer(s, rows)
    assert answers == [coconut.think_and_answer(s, [row])[0][0] for row in rows]


def test_gradient_reaches_the_question_through_the_thoughts(model):
    """The last thought by itself has a gradient at the question's embeddings, and cutting the
    thoughts out of the gradient changes it: the equality with `naive` above is no accident."""
    row = Sequence([1, 2, 3, BOT], 3, [EOT, 7, EOS])
    loss, thoughts = coconut.coconut_loss(model, collate([row], PAD))
    wte = model.wte.weight
    at_question = torch.autograd.grad(thoughts[0, 2, 0], wte, retain_graph=True)[0][[1, 2, 3]]
    assert (at_question.norm(dim=1) > 1e-3).all()
    with_thoughts, = torch.autograd.grad(loss, wte)
    cut, = torch.autograd.grad(naive(model, row, detach=True)[0] / 2, wte)
    assert (with_thoughts - cut)[[1, 2, 3]].norm() > 0.05 * with_thoughts[[1, 2, 3]].norm()


def test_thoughts_carry_the_question(model):
    """After <eot> the answer is read off what the thoughts saw: another question, other
    thoughts."""
    rows = [Sequence([q, 2, BOT], 2, [EOT, EOS]) for q in (1, 9)]
    _, thoughts = coconut.coconut_loss(model, collate(rows, PAD))
    assert not close(thoughts[0], thoughts[1])


def test_company_does_not_change_an_answer(model, examples, tok, machine):
    """The answer to an example is the same first or last, in small batches or large, padded or not,
    and whatever language it was given to learn from."""
    rows = sequences(examples, tok, (2,) * 5)
    s = setup_of(model, tok, machine, decoding(12))
    alone = [coconut.think_and_answer(s, [row])[0][0] for row in rows]
    assert len(set(map(tuple, alone))) > 1
    for order in ([4, 3, 2, 1, 0], [1, 2], [2, 0, 2], [3, 4, 0]):
        answers, thoughts, _ = coconut.think_and_answer(s, [rows[i] for i in order])
        assert answers == [alone[i] for i in order] and thoughts.shape == (len(order), 2, 32)
    without = [row._replace(language=[EOT]) for row in rows]
    assert coconut.think_and_answer(s, without)[0] == alone


def test_answers_in_all_the_block(machine):
    """Question, thoughts and answer may fill the block to its last position, and no further."""
    short = tiny_model(n_positions=12)
    rows = [Sequence([1] * 8 + [BOT], 2, [EOT]), Sequence([1, BOT], 2, [EOT])]
    never = SimpleNamespace(eos=63)
    answers, *_ = coconut.think_and_answer(setup_of(short, never, machine, decoding(30)), rows)
    assert [len(a) for a in answers] == [1, 8]      # the token that position 12 predicts ends a row


@pytest.mark.parametrize("given, right, n", [
    (("### 5", "### 7"), 1, 2), (("### 5", "### 6.0"), 2, 2), (("5", "6"), 0, 2)])
def test_evaluate_counts_what_was_decoded(text_tok, machine, given, right, n):
    """Accuracy is the share of right answers, in the order of the items; tokens are those decoded
    plus the thoughts; the model comes back in the mode it was in."""
    long = "a much longer question than that of the other item"
    items = [dict(question=long, steps=[], answer="5"),
             dict(question="short", steps=[], answer="6")]
    model = tiny_model(vocab_size=text_tok.n_vocab).train()
    by_length = {}
    for item, said in zip(items, given):
        prompt = text_tok.encode(item["question"] + "\n") + [text_tok.bot]
        by_length[len(prompt)] = text_tok.encode(said)

    def think_and_answer(s, sequences):
        assert not s.model.training
        latent = torch.ones(len(sequences), 2, dtype=torch.bool)
        decoded = [by_length[len(q.prompt)] for q in sequences]
        return decoded, torch.full((len(sequences), 2, 32), 4.5 ** 0.5), latent

    flags = SimpleNamespace(c=2, stage_max=1, method="coconut", plain_stage_0=False, max_new=9,
                            data="data")
    s = setup_of(model, text_tok, machine, flags)
    asked = coconut.sequences_of(coconut.examples_of(s, "test", items), 1, s)
    got = evaluation.evaluate(s, items, asked, think_and_answer)
    assert (got["accuracy"], got["n"]) == (right / 2, n) and model.training
    assert got["tokens"] == 2 + sum(map(len, by_length.values())) / 2
    assert got["sample"] == given[0] and got["thought_norms"] == [12.0, 12.0]
    assert (got["distance_item"], got["distance_across"]) == (0.0, 0.0) and "pairs" not in got


# ---------------------------------------------------------------- schedule

def plan(argv, n_batches=10):
    return coconut.stages(coconut.parse_flags(argv.split())[0], n_batches)


def test_stages_in_updates():
    """One part per stage, the last with its own length; --drop-last-steps adds a stage at the end;
    epochs are passes over the training data."""
    steps = "--stage-max 2 --steps-stage-0 5 --steps-per-stage 7 --steps-last 11"
    assert plan(steps) == [(0, 5), (1, 7), (2, 11)]
    assert plan(steps + " --drop-last-steps") == [(0, 5), (1, 7), (2, 7), (3, 11)]
    epochs = "--stage-max 1 --steps-stage-0 5 --epochs-last 1.5"
    assert plan(epochs, n_batches=10) == [(0, 5), (1, 15)]


@pytest.mark.parametrize("more", ["", " --drop-last-steps", " --epochs-stage-0 2", " --stage-max 1",
                                  " --recipe gsm8k"])
def test_baselines_get_as_many_updates(more):
    """cot and no-cot train on one stage for the sum of Coconut's updates."""
    total = sum(n for _, n in plan("--method coconut" + more))
    for method in ("cot", "no-cot"):
        assert plan(f"--method {method}" + more) == [(0, total)]


@pytest.mark.parametrize("recipe, epochs", [
    ("prosqa", [5, 5, 5, 5, 5, 5, 20]),     # 50 epochs, stage_max 6
    ("prontoqa", [5, 5, 5, 5, 5, 5, 20]),
    ("gsm8k", [6, 3, 3, 3, 35]),            # 50 epochs, stage_max 3 and the extra stage
])
def test_recipes_are_the_papers(recipe, epochs):
    """Both of the paper's runs are 50 epochs of batches of 128 at 1e-4 on GPT-2 with a new
    optimizer at each stage; c is 2 on GSM8k and 1 on ProsQA."""
    flags, _ = coconut.parse_flags(["--recipe", recipe])
    expected = [(stage, n * 140) for stage, n in enumerate(epochs)]
    assert coconut.stages(flags, 140) == expected and sum(epochs) == 50
    assert (flags.data, flags.init, flags.tokenizer) == (recipe, "gpt2", "gpt2")
    assert (flags.batch_size, flags.lr) == (128, 1e-4)
    assert (flags.optimizer, flags.uniform_prob) == ("adamw", 0.0)
    assert flags.reset_optimizer and flags.c == (2 if recipe == "gsm8k" else 1)
    is_gsm8k = recipe == "gsm8k"
    assert flags.lr_decay == 0 and flags.drop_last_steps == flags.plain_stage_0 == is_gsm8k


# ---------------------------------------------------------------- flags

def test_typed_beats_recipe_beats_default():
    """What is typed wins over the recipe, which wins over the defaults; --data picks its own
    recipe."""
    argv = "--recipe prosqa --c 2 --steps-last 10 --no-reset-optimizer"
    flags, typed = coconut.parse_flags(argv.split())
    assert (flags.c, flags.stage_max, flags.reset_optimizer, flags.n_head) == (2, 6, False, 4)
    assert coconut.stages(flags, 140)[-1] == (6, 10) and coconut.stages(flags, 140)[0] == (0, 700)
    assert typed == dict(recipe="prosqa", c=2, steps_last=10, reset_optimizer=False)
    assert coconut.parse_flags(["--data", "gsm8k"])[0].c == 2
    assert coconut.parse_flags(["--data", "prosqa", "--recipe", "chains-mixed"])[0].stage_max == 3
    assert coconut.parse_flags([])[0].data == "chains-mixed" and coconut.parse_flags([])[1] == {}


def test_rows_of_the_table_train_no_stage_again():
    """A table gives all rows the same updates, unless --again is typed."""
    assert coconut.parse_flags([])[0].again
    assert not coconut.parse_flags(["--table"])[0].again
    assert not coconut.parse_flags(["--recipe", "gsm8k"])[0].again
    assert coconut.parse_flags(["--table", "--again"])[0].again


def test_out_folders_differ():
    """Runs that differ in data, method or seed do not share a default folder."""
    outs = [coconut.parse_flags(argv.split())[0].out for argv in
            ("", "--method cot", "--seed 1", "--data prosqa", "--data some/folder/")]
    assert len(set(outs)) == 5 and coconut.parse_flags(["--out", "here"])[0].out == "here"


@pytest.mark.parametrize("argv", [
    "--steps-last 3 --epochs-last 1", "--steps-stage-0 3 --epochs-stage-0 1",
    "--steps-per-stage 3 --epochs-per-stage 1", "--lr -1", "--lr x", "--lr nan", "--batch-size 0",
    "--batch-size 1.5", "--c 0", "--c -1", "--stage-max -1", "--dropout 1.5", "--uniform-prob -0.1",
    "--lr-decay 2", "--weight-decay -1", "--grad-clip -1", "--epochs-last -1", "--method magic",
    "--recipe pizza", "--dtype int8", "--tokenizer words", "--n-embd 10 --n-head 4", "--n-layer 0",
    "--block-size 2", "--max-new 0", "--eval-items 0", "--save-every 0", "--seed -1",
    "--ask what?", "--no-such-flag"])
def test_bad_flags(argv, capsys):
    """A bad value, by itself or together with another, is exit code 2 and a message that names the
    flag."""
    with pytest.raises(SystemExit) as stop:
        coconut.parse_flags(argv.split())
    assert stop.value.code == 2 and argv.split()[0] in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--methods cot", "--methods nonsense", "--seeds 2",
                                  "--beside table.json"])
@pytest.mark.parametrize("more", ["", " --method cot", " --eval-only best.pt"])
def test_settings_of_the_table_need_the_table(flag, more, capsys):
    """Without --table they would be ignored; they are refused, and --table is named."""
    with pytest.raises(SystemExit) as stop:
        coconut.parse_flags((flag + more).split())
    error = capsys.readouterr().err.splitlines()[-1]
    assert stop.value.code == 2 and flag.split()[0] in error and "--table" in error


def test_help_has_a_sentence_per_flag(capsys):
    """--help explains every flag."""
    with pytest.raises(SystemExit) as stop:
        coconut.parse_flags(["--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0 and "None" not in text
    for flag in [*coconut.DEFAULTS, "recipe", "tokenizer", "out", "resume", "overwrite",
                 "eval_only", "ask"]:
        assert "--" + flag.replace("_", "-") in text


def test_help_shows_the_defaults(capsys):
    """--help names the default of each setting that has one, those that most runs need first."""
    with pytest.raises(SystemExit):
        coconut.parse_flags(["--help"])
    text = capsys.readouterr().out
    for name, default in coconut.DEFAULTS.items():
        words = " ".join(text.split(f"--{name.replace('_', '-')} ", 1)[-1].split())
        if default not in (None, False, True):
            assert f"(default {default})" in words, name
    assert text.index("--method ") < text.index("--n-layer ")
