"""CODI: Continuous Chain-of-Thought via Self-Distillation (Shen et al. 2025, arXiv 2502.21074).

One model learns two tasks on one question. As teacher it writes the chain of thought; as student it
thinks n continuous thoughts, each the last hidden state through a small MLP with LayerNorm. Both
end in "The answer is: X". At the ":" of both, which is about to name the answer, the student's
hidden states of all layers are drawn to the teacher's (section 3, equations 1 to 5):

    teacher   question step 1 .. The answer is : X           L_teacher  cross-entropy of the text
                                             |
                                             v  stop-grad    L_KD       L1 of the states, all layers
                                             |
    student   question <bot> o .. o <eot> The answer is : X  L_student  cross-entropy of the answer

    L = alpha L_student + beta L_KD + gamma L_teacher

The teacher's text leaves the last step out: it holds the answer, and the ":" would only copy it.
Read on in this order: sequences, think, codi_loss, distance, train, think_and_answer.
    python codi.py
"""

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

import data_prep
from common import (battery, evaluation, experiment, optim, runtime, schedule, settings, tables,
                    weights)
from common.runtime import count, real
from common.text import CODI_MARK, Sequence, batches, beginning, collate, colons, with_digit
from gpt2 import GrowingCache

METHODS = {
    "codi": "teacher and student in one model",
    "cot": "the whole chain of thought in words, no student",
    "no-cot": "the answer at once",
}
KD = {"smooth-l1": F.smooth_l1_loss, "l1": F.l1_loss, "l2": F.mse_loss}


# ---------------------------------------------------------------- the method

def sequences(example, flags, tok):
    """(student, teacher) of one Example: the Sequences that each reads and writes."""
    question, steps, answer = example
    words = steps if flags.keep_last_step else steps[:-1]
    if flags.method == "no-cot":
        words = []
    student = Sequence(question + [tok.bot], flags.n_latent, [tok.eot] + answer)
    teacher = Sequence(question[:-1], 0, question[-1:] + sum(words, []) + answer)
    return student, teacher


def make_projection(flags, C, saved=None, where="checkpoint"):
    """The module that makes a thought of a state (.., C) (section 3.2): the identity for baselines
    and with --no-projection. saved: the state dict of one, from the file `where`; None: new."""
    if flags.method != "codi" or not flags.projection:
        return nn.Identity()
    norm = nn.LayerNorm(C)
    nn.init.constant_(norm.weight, flags.thought_std)
    projection = nn.Sequential(nn.Dropout(flags.projection_dropout), nn.Linear(C, C), nn.GELU(),
                               nn.Linear(C, C), norm)
    if saved is not None:
        weights.load_into(projection, saved, where)
    return projection


def think(model, projection, cache, x, keep, n):
    """Read x (B, T, C), then feed the projected last state back as the next input, n times. keep
    (B, T) bool: real positions of x, None: all. Returns x (B, 1, C), the last thought, still to be
    read (or the x given if n is 0), its keep, and the states (B, n, C) before projection."""
    states = []
    for _ in range(n):
        h = model(embeds=x, cache=cache, keep=keep, last=1)             # (B, 1, C)
        states.append(h)
        x, keep = projection(h), None
    return x, keep, torch.cat(states, 1) if states else x[:, :0]


def codi_loss(model, projection, student, teacher, colon, flags, static=None, share=(1, 1, 1)):
    """alpha L_student + beta L_KD + gamma L_teacher, and the three as a dict (equations 1 to 5).
    A baseline reads only the teacher's text; its dict is empty.

    student, teacher: Batches of the same examples. colon (B,): where the ":" of both is, counted
    from the end. static: a frozen teacher (None: the model itself). share: if these are part of
    a batch, their share of the student's labels, of the rows and of the teacher's labels.
    """
    # the question is the same for both and read once, but for its last token
    cache = GrowingCache()
    if teacher.prompt.size(1):
        model(teacher.prompt, cache=cache, keep=teacher.keep, last=1)

    # teacher: the question's last token, steps, answer
    with torch.set_grad_enabled(flags.gamma > 0 or flags.method != "codi"):
        words = model(teacher.language, cache=cache.fork(), all_states=True)
    if flags.method != "codi":
        return share[2] * cross_entropy(model, words[-1], teacher), {}

    # student: the question's last token and <bot>, thoughts, answer
    x = model.wte(student.prompt[:, -2:])
    x, _, _ = think(model, projection, cache, x, None, student.latent.size(1))
    x = torch.cat([x, model.wte(student.language).to(x.dtype)], 1)
    said = model(embeds=x, cache=cache, all_states=True)
    said = [h[:, -student.language.size(1):] for h in said]             # (B, T, C), each layer

    # distillation: the states of all layers at the ":" of both, (L + 1, B, C)
    target = states_of(static, teacher) if static is not None else words
    rows = torch.arange(len(colon), device=x.device)
    at_student = torch.stack([h[rows, student.n_language - colon] for h in said])
    at_teacher = torch.stack([h[rows, teacher.n_language - colon] for h in target])

    terms = dict(
        student=share[0] * cross_entropy(model, said[-1], student),
        kd=share[1] * distance(at_student, at_teacher, flags.kd, flags.kd_normalize),
        teacher=share[2] * cross_entropy(model, words[-1], teacher))
    loss = flags.alpha * terms["student"] + flags.beta * terms["kd"]
    return loss + flags.gamma * terms["teacher"], terms


def distance(student, teacher, kind="l1", normalize=True):
    """L_KD: mean over layers, rows and channels of the distance between states (L + 1, B, C), the
    embeddings first, after ln_f last. No gradient reaches the teacher. normalize: divide by the
    standard deviation of the teacher's state, per row and layer, so that no layer outweighs the
    rest (the authors take it over the batch: there a row's loss depends on the other rows)."""
    teacher = teacher.detach().float()
    loss = KD[kind](student.float(), teacher, reduction="none").mean(-1)            # (L + 1, B)
    return (loss / teacher.std(-1) if normalize else loss).mean()


@torch.no_grad()
def states_of(static, teacher):
    """States of the teacher's language in another, frozen model: a list of (B, T, C)."""
    ids = torch.cat([teacher.prompt, teacher.language], 1)
    keep = torch.cat([teacher.keep, torch.ones_like(teacher.language, dtype=torch.bool)], 1)
    return [h[:, teacher.prompt.size(1):] for h in static(ids, keep=keep, all_states=True)]


def cross_entropy(model, h, batch):
    """Mean over the label tokens of a Batch; h (B, T, C): the last states of its language."""
    return F.cross_entropy(model.head(h.flatten(0, 1)[batch.where]).float(), batch.labels)


# ---------------------------------------------------------------- training

def lengths(examples, flags):
    """(n, 2): the tokens of the teacher's prompt and language; items alike share a batch."""
    question, steps, answer = examples.lengths                          # (n,), (n, most), (n,)
    words = steps.sum(1) * (flags.method != "no-cot")
    if words.any() and not flags.keep_last_step:
        words = words - steps[np.arange(len(steps)), (steps > 0).sum(1) - 1]
    return np.stack([question - 1, 1 + words + answer], 1)


def train(s, bar=None):
    """Update by update. s: experiment.Setup; bar: the progress bar of --table. Returns the rows of
    the result table, or None if stopped."""
    flags, machine, model, tok = s.flags, s.machine, s.model, s.tok
    test = experiment.test_sets(s, data_prep.load)  # now: a missing one is found before training
    examples = examples_of(s, "train", s.data["train"])
    rows = with_digit(s.data["train"]) if flags.digits_only else np.arange(len(examples))
    colon = examples.lengths.answer - colons(examples, tok, flags.distill_at,
                                             f"{flags.data}, train.json", rows)
    valid = s.data["valid"][:flags.eval_items]
    valid_examples = examples_of(s, "valid", valid)
    asked, *_ = sides(s, valid_examples).values()
    s_valid = evaluation.with_limit(s, valid_examples)
    static = experiment.frozen_teacher(s, flags.teacher) if flags.teacher else None
    all_lengths = lengths(examples, flags)[rows]
    n_batches = -(-len(rows) // flags.batch_size)
    updates = schedule.n_updates(flags.steps, flags.epochs, n_batches)
    warmup = max(1, round(flags.warmup * updates))
    run = experiment.new_run(s, dict(done=0, best=-1.0, rows=None), updates, bar, prompt=CODI_MARK)
    at, optimizers = run.at, run.resume(optim.new_optimizers(flags, model, s.projection))
    learned = [p for o in optimizers for group in o.param_groups for p in group["params"]]
    order = None

    while at["done"] < updates * (1 + at.get("backs", 0)):         # backs: how often --again came
        # data: its order is a function of seed and epoch, so resuming needs no replay
        epoch, k = divmod(at["done"], n_batches)
        if order is None or k == 0:
            order = batches(all_lengths, flags.batch_size, runtime.generator(flags.seed, epoch))
        chosen = rows[order[k]]
        pairs = [sequences(examples[i], flags, tok) for i in chosen]
        n_labels = [sum(len(q.language) - 1 for q in side) for side in zip(*pairs)]

        # learning rate: each time that --again comes, the whole schedule from its start
        shape = optim.SCHEDULES[flags.schedule]
        optim.set_rate(optimizers, shape(at["done"] % updates, updates, flags.lr, warmup))

        # forward and backward: the whole batch's mean losses, to which its parts add up
        machine.seed(flags.seed, at["done"])
        losses = torch.zeros(4 if flags.method == "codi" else 1, device=machine.device)
        for part in machine.share(range(len(pairs)), flags.accumulate):
            student, teacher = (collate(side, tok.eos, machine.device)
                                for side in zip(*(pairs[i] for i in part)))
            ends = torch.from_numpy(colon[chosen[part]]).to(machine.device)
            share = (len(student.labels) / n_labels[0], len(part) / len(pairs),
                     len(teacher.labels) / n_labels[1])
            with machine.autocast():
                loss, terms = codi_loss(model, s.projection, student, teacher, ends, flags,
                                        static, share)
            loss.backward()
            losses += torch.stack([loss, *terms.values()]).detach()
        loss, *terms = machine.sum_gradients(learned, losses)

        # step
        optim.step(optimizers, learned, flags.grad_clip)
        end = (at["done"] + 1) % updates == 0
        read = sum(pairs, ()) if flags.method == "codi" else [teacher for _, teacher in pairs]
        run.step(loss, read, end)

        # validation: the best model is kept, as a plain one that any script loads
        if at["done"] % (flags.eval_every or n_batches) == 0 or end:
            v = evaluation.evaluate(s_valid, valid, asked, think_and_answer)
            run.valid(v, dict(zip(("student", "kd", "teacher"), (t.item() for t in terms))))
            if run.is_best(v):
                plain = optim.merged(model.state_dict(), flags.lora_alpha, flags.lora_r)
                run.save("best.pt", optimizers, model=plain)
        if end and flags.again and flags.method == "codi":
            schedule.once_more(run, updates)
        if run.pause(optimizers, flags.save_every, end):
            return None

    # the rows of the table are those of the best model
    best = trained_model(f"{flags.out}/best.pt", vars(flags))
    at["rows"] = evaluation.report(best, test, examples_of, sides, think_and_answer)
    for row in at["rows"]:
        run.log("test", seed=flags.seed, updates=at["done"], **row)
    run.save("last.pt", optimizers)
    run.close()
    return at["rows"]


# ---------------------------------------------------------------- decoding and evaluation

@torch.no_grad()
def think_and_answer(s, sequences, thoughts=None):
    """Think and decode greedily. s: experiment.Setup. thoughts (B, n, C): read these instead of
    thinking, of each row as many as its Sequence has. Returns token-id lists, in order, states
    (B, n, C) before projection (or the thoughts given) and latent (B, n): who has which."""
    model, batch = s.model, evaluation.given(s, sequences)
    with s.machine.autocast():
        cache = evaluation.new_cache(s, batch)
        x, keep, states = model.wte(batch.prompt), batch.keep, thoughts
        if thoughts is None:
            x, keep, states = think(model, s.projection, cache, x, keep, batch.latent.size(1))
        else:
            x, keep = torch.cat([x, thoughts], 1), torch.cat([keep, batch.latent], 1)
        x = torch.cat([x, model.wte(batch.language).to(x.dtype)], 1)
        keep = None if keep is None else F.pad(keep, (0, 1), value=True)
        h = model(embeds=x, cache=cache, keep=keep, last=1)[:, -1]
        return model.decode(cache, h, evaluation.limit(s), s.tok.eos), states, batch.latent


def sides(s, examples):
    """{who: Sequences}: student and teacher, or the one side that a baseline has."""
    student, teacher = zip(*(sequences(e, s.flags, s.tok) for e in examples))
    if s.flags.method == "codi":
        return dict(student=student, teacher=teacher)
    return {s.flags.method: teacher}


# ---------------------------------------------------------------- settings

PAPER = settings.AS_GPT2 | dict(                      # the authors' script for GPT-2 on GSM8k-Aug
    n_latent=6, again=False, thought_std=1.0, kd="smooth-l1", lora_r=128, train_marks=False,
    digits_only=True, block_size=1024, dropout=0.1, epochs=40, batch_size=128, optimizer="adamw",
    lr=3e-3, schedule="cosine", beta2=0.999, grad_clip=2.0, eval_every=0, eval_items=10**9,
    max_new=256)
RECIPES = {
    "chains-mixed": dict(data="chains-mixed"),
    "prosqa-mini": dict(data="prosqa-mini", block_size=256, tokenizer="compact-is-a", steps=4000),
    **{name: PAPER | dict(data=name) for name in ("gsm8k", "gsm8k-nl")},
    "commonsense": PAPER | dict(data="commonsense", digits_only=False),
    "llama-1b": PAPER | dict(data="gsm8k", init="Llama-3.2-1B-Instruct", dropout=0.0, beta=20.0,
                             epochs=10, lr=8e-4, distill_at=CODI_MARK),
}
FROZEN = "{out}/teacher-{seed}/best.pt"               # filled in for each seed
ABLATIONS = {            # a row of --table -> what it changes (the paper's tables, figures)
    "codi": {}, "cot": dict(method="cot", keep_last_step=True), "no-cot": dict(method="no-cot"),
    "teacher": dict(method="cot", keep_last_step=False),
    "static-teacher": dict(teacher=FROZEN, gamma=0.0), "static-multitask": dict(teacher=FROZEN),
    "no-kd": dict(beta=0.0), "last-step": dict(keep_last_step=True),
    "no-projection": dict(projection=False), "no-normalize": dict(kd_normalize=False),
    "distill-is": dict(distill_at="The answer is"), "distill-the": dict(distill_at="The"),
    "gamma-0.5": dict(gamma=0.5), "gamma-2": dict(gamma=2.0), **{kd: dict(kd=kd) for kd in KD},
    **{f"thoughts-{n}": dict(n_latent=n) for n in (0, 1, 2, 4, 6, 12)}}
SETTINGS = settings.together({
    settings.MOST: [
        ("method", "codi", METHODS, "what is trained"),
        ("n_latent", 3, count(0), "continuous thoughts of the student"),
        ("steps", 1000, count(1), "updates"),
        ("epochs", None, real(), "the same in passes over the training data"),
        ("again", True, bool, "what is not learned then is trained as long again; not by --table")],
    "method": [
        ("projection", True, bool, "MLP and LayerNorm between a state and the thought fed back"),
        ("projection_dropout", 0.0, real(0, 1), "dropout before the projection"),
        ("thought_std", 0.1, real(), "gain of its LayerNorm, at the start (the authors: 1)"),
        ("kd", "l1", tuple(KD), "distance of the states (paper: l1; authors' code: smooth-l1)"),
        ("kd_normalize", True, bool, "divide it by the standard deviation of the teacher's state"),
        ("alpha", 1.0, real(), "weight of the student's loss"),
        ("beta", 1.0, real(), "weight of the distillation (0: none)"),
        ("gamma", 1.0, real(), "weight of the teacher's loss (0: its task is not learned)"),
        ("keep_last_step", None, bool, "the words have the last step too (default: only cot's)"),
        ("distill_at", CODI_MARK.strip(), beginning, f"where this beginning of {CODI_MARK!r} ends"),
        ("teacher", None, str, "distill from this frozen model of --method cot, not from itself"),
        ("digits_only", False, bool, "only items whose answer is a number (authors on GSM8k)")],
    **optim.LORA,
    "learning": [
        ("schedule", "trapezoid", tuple(optim.SCHEDULES), "of the learning rate, after warm-up"),
        ("warmup", 0.03, real(0, 1), "share of the updates with linear warm-up")],
    "evaluation and files": [
        ("ood", None, str, "more test sets, with commas, or 'none' (default: those of the data)"),
        ("rows", None, str, "--table: which rows, with commas (default: codi,cot,no-cot)")],
}, RECIPES)
DEFAULTS = settings.defaults(SETTINGS, data="chains-mixed", batch_size=64, lr=4e-3, eval_every=200)


def parse_flags(argv=None):
    """The settings of a run, as a Namespace, and those that were typed, as a dict."""
    flags, typed, error = settings.parse(argv, "codi.py", __doc__, SETTINGS, DEFAULTS, RECIPES,
                                         ("rows", ABLATIONS, METHODS), [("steps", "epochs")])
    if flags.keep_last_step is None:
        flags.keep_last_step = flags.method == "cot"
    flags.ood = flags.ood or data_prep.OOD.get(flags.data, "none")
    name = "table" if flags.table else f"{flags.method}-{flags.seed}".removeprefix("codi-")
    flags.out = settings.out_folder(flags, f"codi-{name}")
    if flags.teacher and flags.method != "codi":
        error(f"--teacher is for --method codi; --method {flags.method} has no student")
    return flags, typed


# ---------------------------------------------------------------- main

def examples_of(s, split, items, data=None):
    """Examples of the items, with room for the thoughts."""
    return experiment.examples_of(s, items, f"{data or s.flags.data}, {split}.json",
                                  2 + s.flags.n_latent, CODI_MARK)


def run(flags, typed, bar=None):
    """One training run, from its start or where its folder left it. Returns what train returns."""
    flags, resumed = experiment.open_run(flags, typed, SETTINGS, DEFAULTS)
    if resumed and resumed["at"]["rows"] is not None:
        return resumed["at"]["rows"]
    s = experiment.start(flags, resumed, data_prep.load, CODI_MARK)
    where = flags.out if resumed else flags.init
    saved = resumed.get("projection", {}) if resumed else s.state.get("projection") or None
    projection = make_projection(flags, s.model.config.n_embd, saved, where)     # None: a new one
    optim.add_lora(s.model, flags, [s.tok.bot, s.tok.eot])
    if resumed:
        weights.load_into(s.model, resumed["model"], flags.out)      # LoRA's updates apart
    s = experiment.place(s._replace(projection=projection))
    experiment.describe(s, bar)
    return train(s, bar)


def trained_model(path, changed):
    """The Setup of a checkpoint of this script."""
    s = experiment.open_checkpoint(path, SETTINGS, DEFAULTS, changed)
    saved = s.state.get("projection", {})
    projection = make_projection(s.flags, s.model.config.n_embd, saved, path)
    return experiment.place(s._replace(projection=projection))


def evaluate_checkpoint(flags, changed):
    """--eval-only: the table of a checkpoint, or what --thoughts or --ask asks for."""
    s = trained_model(flags.eval_only, changed)
    if flags.ask is not None:
        return battery.ask(s, flags.ask, 2 + s.flags.n_latent, CODI_MARK, sides, think_and_answer,
                           "in words: ")
    test = experiment.test_sets(s, data_prep.load)
    if "thoughts" in changed:
        return battery.report(s, flags.eval_only, test, examples_of, sides, think_and_answer)
    tables.print_sides(evaluation.report(s, test, examples_of, sides, think_and_answer), s.flags)


def train_table(flags):
    """--table: every row for every seed; the paper's tables with the curves of validation."""
    data = experiment.load_first(flags, data_prep.load)
    n = len(with_digit(data["train"]) if flags.digits_only else data["train"])
    updates = schedule.n_updates(flags.steps, flags.epochs, -(-n // flags.batch_size))

    def replaced(path):
        return battery.all_rows(trained_model(path, {}), data["test"], examples_of, sides,
                                think_and_answer)

    variants = tables.with_teachers(flags.rows, ABLATIONS)
    return tables.train_and_write("codi.py", flags, variants, 2, updates, run, replaced, ("codi",),
                                  data_prep.write_json, curves=tables.validation)


def main(argv=None):
    flags, typed = parse_flags(argv)
    return experiment.main("codi.py", flags, typed, run, tables.print_sides, evaluate_checkpoint,
                           train_table, also=("ood",))


if __name__ == "__main__":
    runtime.run_main(main)
