"""CODI: Continuous Chain-of-Thought via Self-Distillation (Shen et al. 2025, arXiv 2502.21074).

One model learns two tasks on one question. As teacher it writes the chain of thought, as student it
thinks n continuous thoughts, each the last hidden state through a small MLP with LayerNorm; both end
in "The answer is: X". At the ":" of both, which is about to name the answer, the student's hidden
states of all layers are drawn to the teacher's (section 3, equations 1 to 5):

    teacher   question step 1 .. The answer is : X            L_teacher  cross-entropy of steps and answer
                                             |
                                             v  stop-grad     L_KD       L1 between the states of all layers
                                             |
    student   question <bot> o .. o <eot> The answer is : X   L_student  cross-entropy of the answer

    L = alpha L_student + beta L_KD + gamma L_teacher

The last step is left out of the teacher's text: it would hold the answer, and its ":" would only copy.
Read on in this order: sequences, think, codi_loss, distance, train, answer.
    python codi.py
"""

import argparse
import functools
import json
import math
import os
import time

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

import data_prep
import runtime
from data_prep import Sequence
from gpt2 import GPT2, GPT2Config, GrowingCache, Muon, PRESETS, StaticCache
from runtime import UserError

METHODS = {"codi": "teacher and student in one model", "cot": "the whole chain of thought in words, no student",
           "no-cot": "the answer at once"}
PROMPT = "The answer is: "           # and then the answer; its ":" is where student and teacher are compared
COMPACT = {"compact": "numbers-apart", "compact-gpt2": "gpt2", "compact-is-a": "is-a"}      # flag -> pattern
NOT_OF_A_RUN = ("resume", "out", "device", "compile", "accumulate", "overwrite", "recipe", "table", "rows", "seeds",
                "beside", "ood")
ABLATIONS = {                        # a row of --table -> the flags it changes (tables 1, 3 and figures of the paper)
    "codi": {}, "cot": dict(method="cot", keep_last_step=True), "no-cot": dict(method="no-cot"),
    "teacher": dict(method="cot", keep_last_step=False), "static-teacher": dict(teacher="teacher", gamma=0.0),
    "static-multitask": dict(teacher="teacher"), "no-kd": dict(beta=0.0),
    "last-step": dict(keep_last_step=True), "no-projection": dict(projection=False),
    "distill-is": dict(distill_at="The answer is"), "distill-the": dict(distill_at="The"),
    "gamma-0.5": dict(gamma=0.5), "gamma-2": dict(gamma=2.0),
    "l1": dict(kd="l1"), "smooth-l1": dict(kd="smooth-l1"), "l2": dict(kd="l2"),
    "no-normalize": dict(kd_normalize=False), **{f"thoughts-{n}": dict(n_latent=n) for n in (0, 1, 2, 4, 6, 12)}}


def cosine(update, total, peak, warmup):
    """Learning rate at `update` of 0..total-1: linear warm-up over `warmup` updates, then half a cosine to 0."""
    if update < warmup:
        return peak * (update + 1) / warmup
    return peak * (1 + math.cos(math.pi * (update - warmup) / max(1, total - warmup))) / 2


SCHEDULES = {"cosine": cosine, "trapezoid": functools.partial(runtime.learning_rate, decay=0.3)}

# ---------------------------------------------------------------- flags

DEFAULTS = dict(                     # the embedded data: minutes on two CPU cores
    method="codi", data="chains-mixed", n_latent=3, projection=True, projection_dropout=0.0, thought_std=0.1,
    kd="l1", kd_normalize=True, alpha=1.0, beta=1.0, gamma=1.0, keep_last_step=None, distill_at="The answer is:",
    teacher=None,
    init="scratch", n_layer=2, n_head=4, n_embd=128, embd_std=0.02, state_std=1.0, block_size=128, dropout=0.0,
    lora_r=0, lora_alpha=32.0, lora_dropout=0.1, train_marks=True, digits_only=False,
    steps=1600, batch_size=64, optimizer="muon", lr=4e-3, schedule="trapezoid", warmup=0.03, weight_decay=0.1, beta2=0.95,
    grad_clip=1.0, seed=0, accumulate=1, device="auto", dtype="auto", compile=False, eval_every=250, eval_items=200,
    max_new=64, save_every=500)
PAPER = dict(                        # the authors' script for GPT-2 on GSM8k-Aug
    init="gpt2", n_latent=6, thought_std=1.0, kd="smooth-l1", lora_r=128, train_marks=False, digits_only=True,
    block_size=1024, dropout=0.1, epochs=40, batch_size=128, optimizer="adamw", lr=3e-3, schedule="cosine", beta2=0.999,
    grad_clip=2.0, eval_every=0, eval_items=10**9, max_new=256)
RECIPES = {
    "chains-mixed": dict(data="chains-mixed"),
    "prosqa-mini": dict(data="prosqa-mini", block_size=256, tokenizer="compact-is-a", steps=4000, eval_every=500),
    "gsm8k": PAPER | dict(data="gsm8k"),
    "gsm8k-nl": PAPER | dict(data="gsm8k-nl"),
    "commonsense": PAPER | dict(data="commonsense", digits_only=False),
}
OOD = {**dict.fromkeys(("chains", "chains-mixed"), "chains-longer,chains-larger"),
       **dict.fromkeys(("gsm8k", "gsm8k-nl"), "svamp,gsm-hard,multiarith")}


def parse_flags(argv=None):
    """Flags, filled up from the recipe: defaults < recipe < what was typed. Also returns the typed ones."""
    p = argparse.ArgumentParser(usage="python codi.py [flags], --help lists them", description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter,
                                epilog="Defaults are those of the recipe; each run prints its flags.")
    add, count, real, yes_no = p.add_argument, data_prep.at_least, data_prep.real, argparse.BooleanOptionalAction
    add("--method", choices=METHODS, help="; ".join(f"{name}: {what}" for name, what in METHODS.items()))
    add("--recipe", choices=RECIPES, help="a set of defaults; chosen by --data where one has that name")
    add("--data", help="data set: a name under data/ (chains-mixed, chains and prosqa-mini are made if absent) or a folder")
    add("--n-latent", type=count(0), help="continuous thoughts of the student")
    add("--projection", action=yes_no, help="MLP and LayerNorm between a state and the thought that is fed back")
    add("--projection-dropout", type=real(1), help="dropout before the projection")
    add("--thought-std", type=real(), help="initial spread of a projected thought: gain of its LayerNorm (the authors': 1)")
    add("--kd", choices=KD, help="distance between student's and teacher's states (paper: l1; authors' code: smooth-l1)")
    add("--kd-normalize", action=yes_no, help="divide it by the standard deviation of the teacher's state")
    add("--alpha", type=real(), help="weight of the student's loss")
    add("--beta", type=real(), help="weight of the distillation (0: none)")
    add("--gamma", type=real(), help="weight of the teacher's loss (0: the model does not learn the teacher's task)")
    add("--keep-last-step", action=yes_no, help="the last step stands in the words (default: for --method cot only)")
    add("--distill-at", help=f"distill where this beginning of {PROMPT!r} ends (default: all of it, so at its ':')")
    add("--teacher", metavar="CKPT", help="distill from this frozen model of --method cot instead of the model itself")
    add("--init", help=f"scratch, {', '.join(PRESETS)}, a pytorch_model.bin, or a checkpoint of this project")
    add("--n-layer", type=count(1), help="layers, from scratch")
    add("--n-head", type=count(1), help="attention heads, from scratch")
    add("--n-embd", type=count(1), help="width, from scratch")
    add("--embd-std", type=real(), help="initial spread of the embeddings, from scratch (GPT-2: 0.02)")
    add("--state-std", type=real(), help="initial spread of the last states: gain of ln_f, from scratch (GPT-2: 1)")
    add("--block-size", type=count(8), help="most positions in a sequence, from scratch")
    add("--tokenizer", choices=(*COMPACT, "gpt2"), help="as in coconut.py")
    add("--dropout", type=real(1), help="dropout, everywhere that GPT-2 has it")
    add("--lora-r", type=count(0), help="rank of LoRA on the blocks' matrices, which then stay as they were (0: train all)")
    add("--lora-alpha", type=real(), help="LoRA's update is scaled by this / rank")
    add("--lora-dropout", type=real(1), help="dropout before LoRA")
    add("--train-marks", action=yes_no, help="with LoRA, train the embeddings of <bot> and <eot> (the authors' stay frozen)")
    add("--digits-only", action=yes_no, help="train on items whose answer begins with a digit alone (the authors on GSM8k)")
    add("--steps", type=count(1), help="updates")
    add("--epochs", type=real(), help="the same in passes over the training data")
    add("--batch-size", type=count(1), help="questions per update, those of all processes together")
    add("--accumulate", type=count(1), help="read each process's share of an update in that many parts, to save memory")
    add("--optimizer", choices=("adamw", "muon"), help="muon: Muon for the blocks' matrices, AdamW for the rest")
    add("--lr", type=real(), help="peak learning rate")
    add("--schedule", choices=SCHEDULES, help="the rate after warm-up: cosine to 0, or trapezoid: constant, and linear to 0 over "
        "the last 30 %%")
    add("--warmup", type=real(1), help="share of the updates with linear warm-up")
    add("--weight-decay", type=real(), help="weight decay, on matrices only")
    add("--beta2", type=real(1), help="AdamW beta 2")
    add("--grad-clip", type=real(), help="largest gradient norm (0: no clipping)")
    add("--seed", type=count(0), help="of weights, data order and dropout")
    add("--device", help="auto, cpu, cuda, cuda:1, mps")
    add("--dtype", choices=("auto", "float32", "bfloat16"), help="of matrix products; auto: what is fast here")
    add("--compile", action=yes_no, help="torch.compile (slow start, fast run)")
    add("--eval-every", type=count(0), help="updates between validations (0: once per epoch)")
    add("--eval-items", type=count(1), help="validation items used")
    add("--max-new", type=count(1), help="most tokens decoded per answer")
    add("--save-every", type=count(1), help="updates between checkpoints")
    add("--out", help="folder of checkpoints and metrics (default: out/DATA-METHOD-SEED)")
    add("--ood", help="further test sets, with commas; 'none' for none (default: those of the data set)")
    add("--resume", action="store_true", default=None, help="continue the run in --out with its own flags")
    add("--overwrite", action="store_true", default=None, help="start again in an --out that holds a run")
    add("--table", action="store_true", default=None, help="train --rows for every seed, as far as --out does not hold them "
        "already, and print the paper's tables")
    add("--rows", help=f"--table: which, with commas, of {', '.join(ABLATIONS)} (default: codi,cot,no-cot)")
    add("--seeds", type=count(1), help="--table: how many seeds, from --seed up (default 2)")
    add("--beside", metavar="JSON", help="--table: add the rows of this table.json, which coconut.py --table wrote on the same data")
    add("--eval-only", metavar="CKPT", help="no training: evaluate a checkpoint on --data's test split and --ood")
    add("--ask", metavar="QUESTION", help="no training: answer one question with --eval-only's model")
    typed = {k: v for k, v in vars(p.parse_args(argv)).items() if v is not None}
    if "steps" in typed and "epochs" in typed:
        p.error("--steps and --epochs exclude each other: give one")
    recipe = typed.get("recipe", typed.get("data"))
    flags = argparse.Namespace(**DEFAULTS | RECIPES.get(recipe, {}) | typed)
    if "steps" in typed or not hasattr(flags, "epochs"):         # epochs of a recipe or typed ones beat default steps
        flags.epochs = None
    if flags.keep_last_step is None:
        flags.keep_last_step = flags.method == "cot"
    flags.tokenizer = getattr(flags, "tokenizer", "compact" if flags.init == "scratch" else "gpt2")
    flags.ood = getattr(flags, "ood", OOD.get(flags.data, "none"))
    run_name = "table" if "table" in typed else f"{flags.seed}" if flags.method == "codi" else f"{flags.method}-{flags.seed}"
    flags.out = getattr(flags, "out", os.path.join("out", f"{os.path.basename(os.path.normpath(flags.data))}-codi-{run_name}"))
    for row in typed.get("rows", "codi").split(","):
        if row not in ABLATIONS:
            p.error(f"--rows: there is no {row!r}; choose among {', '.join(ABLATIONS)}")
    if flags.init == "scratch" and flags.n_embd % flags.n_head:
        p.error(f"--n-embd {flags.n_embd} is not a multiple of --n-head {flags.n_head}: change one of them")
    if flags.init != "scratch" and "tokenizer" in typed:
        p.error("--tokenizer is for --init scratch: released weights and checkpoints have their own")
    if flags.lora_r and flags.optimizer == "muon":
        p.error("--lora-r wants --optimizer adamw: Muon is for whole matrices")
    if not flags.distill_at.strip() or not PROMPT.startswith(flags.distill_at):
        p.error(f"--distill-at {flags.distill_at!r} is no beginning of {PROMPT!r}: give 'The', 'The answer' and so on")
    if flags.teacher and flags.method != "codi":
        p.error(f"--teacher is for --method codi; --method {flags.method} has no student")
    if "table" in typed and typed.keys() & {"resume", "method", "eval_only", "teacher"}:
        p.error("--table goes on by itself and trains --rows: leave out --resume, --method, --teacher and --eval-only")
    if "ask" in typed and ("eval_only" not in typed or not flags.ask.strip()):
        p.error("--ask needs a question and a trained model: add --eval-only CKPT")
    return flags, typed


# ---------------------------------------------------------------- the method

KD = {"smooth-l1": F.smooth_l1_loss, "l1": F.l1_loss, "l2": F.mse_loss}


def sequences(example, flags, tok):
    """(student, teacher) of one example: what each reads and writes. A baseline has one of the two."""
    question, steps, answer = example
    words = [] if flags.method == "no-cot" else steps if flags.keep_last_step else steps[:-1]
    return (Sequence(question + [tok.bot], flags.n_latent, [tok.eot] + answer),
            Sequence(question[:-1], 0, question[-1:] + sum(words, []) + answer))


def make_projection(flags, C):
    """A state (.., C) -> the thought that is fed back (section 3.2); --no-projection: the state itself."""
    if not flags.projection:
        return nn.Identity()
    norm = nn.LayerNorm(C)
    nn.init.constant_(norm.weight, flags.thought_std)
    return nn.Sequential(nn.Dropout(flags.projection_dropout), nn.Linear(C, C), nn.GELU(), nn.Linear(C, C), norm)


def think(model, projection, cache, x, keep, n):
    """Read x (B, T, C), then feed the projected last state back as the next input embedding, n times.

    keep (B, T) bool: real positions of x, None: all. Returns x (B, 1, C), the last thought, still to
    be read (or the x given if n is 0), its keep, and the states (B, n, C) before projection.
    """
    states = []
    for _ in range(n):
        h = model(embeds=x, cache=cache, keep=keep, last=1)             # (B, 1, C)
        states.append(h)
        x, keep = projection(h), None
    return x, keep, torch.cat(states, 1) if states else x[:, :0]


def codi_loss(model, projection, student, teacher, colon, flags, static=None, share=(1, 1, 1)):
    """alpha L_student + beta L_KD + gamma L_teacher, and the three as a dict (equations 1 to 5).

    student, teacher: Batches of the same examples; colon: two (B,) tensors, where in the student's and
    in the teacher's language the states are compared. The question, alike for both, is read once: teacher
    and student go on from its cache. static: a frozen model that is the teacher of the distillation.
    share: where these rows are only a part of a batch, the share that they have of the student's labels, of
    the rows and of the teacher's labels; the losses are then parts of the batch's, which is their sum.
    """
    cache, target = GrowingCache(), None
    if teacher.prompt.size(1):                                          # all of the question but its last token
        model(teacher.prompt, cache=cache, keep=teacher.keep, last=1)
    with torch.set_grad_enabled(flags.gamma > 0):
        words = model(teacher.language, cache=cache.fork(), all_states=True)
    x = model.wte(student.prompt[:, -2:])                               # the last token of the question, <bot>
    x, _, _ = think(model, projection, cache, x, None, student.latent.size(1))
    answer = model(embeds=torch.cat([x, model.wte(student.language).to(x.dtype)], 1), cache=cache, all_states=True)
    answer = [h[:, -student.language.size(1):] for h in answer]
    if static is not None:
        with torch.no_grad():
            words_read = torch.cat([teacher.prompt, teacher.language], 1)
            keep = torch.cat([teacher.keep, torch.ones_like(teacher.language, dtype=torch.bool)], 1)
            target = [h[:, teacher.prompt.size(1):] for h in static(words_read, keep=keep, all_states=True)]
    rows = torch.arange(len(colon[0]), device=x.device)
    parts = dict(
        student=share[0] * cross_entropy(model, answer[-1], student),
        kd=share[1] * distance(torch.stack([h[rows, colon[0]] for h in answer]),
                               torch.stack([h[rows, colon[1]] for h in target or words]), flags.kd, flags.kd_normalize),
        teacher=share[2] * cross_entropy(model, words[-1], teacher))
    return flags.alpha * parts["student"] + flags.beta * parts["kd"] + flags.gamma * parts["teacher"], parts


def words_loss(model, batch):
    """The baselines' loss: cross-entropy of all that stands after the question."""
    cache = GrowingCache()
    if batch.prompt.size(1):
        model(batch.prompt, cache=cache, keep=batch.keep, last=1)
    return cross_entropy(model, model(batch.language, cache=cache), batch)


def cross_entropy(model, h, batch):
    """Mean over the label tokens of a Batch; h (B, T, C) are the last states of its language."""
    return F.cross_entropy(model.head(h.flatten(0, 1)[batch.where]).float(), batch.labels)


def distance(student, teacher, kind="l1", normalize=True):
    """L_KD: mean over layers, rows and channels of the distance between states (L + 1, B, C), the
    embeddings' first, that after ln_f last. No gradient reaches the teacher. normalize divides each
    row's and layer's by the standard deviation of the teacher's state, so that no layer outweighs the
    rest (the authors take it over the whole batch: their loss of a row depends on the others)."""
    teacher = teacher.detach().float()
    loss = KD[kind](student.float(), teacher, reduction="none").mean(-1)            # (L + 1, B)
    return (loss / teacher.std(-1) if normalize else loss).mean()


def colon_in(answer, tok, text, where):
    """Which token of an answer (ids of "The answer is: X") ends `text`, its beginning: its state names what follows.

    The search begins where the answer does, so a prompt that also stands in the question or in a step
    does not mislead it. Raises UserError, naming `where` (file and item), if no token ends there.
    """
    for i in range(len(answer)):
        if tok.decode(answer[:i + 1]).rstrip() == text.rstrip():
            return i
    raise UserError(f"{where}: in {tok.decode(answer)!r} no token ends where {text!r} does; choose another --distill-at "
                    "or --tokenizer.")


def colons(examples, rows, tok, text, where):
    """colon_in of the answers of the Examples in these rows, (n,). One is looked at for all that begin as it does."""
    start, at = examples.start[examples.first[1:] - 1][rows], np.full(len(rows), -1)
    while (left := np.flatnonzero(at < 0)).size:
        row = rows[left[0]]
        answer = examples[row].answer
        i = colon_in(answer, tok, text, f"{where}, item {row + 1}")
        beginnings = np.take(examples.ids, start[left, None] + np.arange(i + 1), mode="clip")
        at[left[(beginnings == answer[:i + 1]).all(1)]] = i
    return at


class Pairs:
    """Pairs of student and teacher, made of the Examples in `rows` when a batch asks for them. For all n of them:

    lengths (n, 2): tokens of the teacher's prompt and language, for batches; labels (n, 2): label tokens of
    student and teacher; positions (n,): what both read, or a baseline's one; colon (n, 2): where the ":" stands
    in the language of student and teacher.
    """

    def __init__(self, examples, flags, tok, where, rows=None):
        self.examples, self.flags, self.tok = examples, flags, tok
        self.rows = np.arange(len(examples)) if rows is None else rows
        question, steps, answer = (n[self.rows] for n in examples.lengths)
        words = steps.sum(1) * (flags.method != "no-cot")
        if words.any() and not flags.keep_last_step:
            words = words - steps[np.arange(len(steps)), (steps > 0).sum(1) - 1]
        self.lengths = np.stack([question - 1, 1 + words + answer], 1)
        self.labels = np.stack([answer, words + answer], 1)
        self.positions = self.lengths.sum(1)
        if flags.method == "codi":
            self.positions += question + 1 + flags.n_latent + 1 + answer
        at = colons(examples, self.rows, tok, flags.distill_at, where)
        self.colon = np.stack([1 + at, 1 + words + at], 1)      # both languages begin with one given token

    def __getitem__(self, i):
        """(student, teacher), Sequences."""
        return sequences(self.examples[self.rows[i]], self.flags, self.tok)

    def batch(self, chosen, pad, device):
        """(student Batch, teacher Batch, colon) of the pairs with these numbers."""
        return (*(data_prep.collate(side, pad, device) for side in zip(*(self[i] for i in chosen))),
                torch.from_numpy(self.colon[chosen].T).to(device))


# ---------------------------------------------------------------- LoRA


class LoRA(nn.Module):
    """A frozen Linear plus a trained update of rank r: y = W x + b + (alpha / r) B A x (Hu et al. 2021,
    arXiv 2106.09685). B starts at zero, so the model starts as it was."""

    def __init__(self, linear, r, alpha, dropout):
        super().__init__()
        self.linear, self.scale, self.dropout = linear, alpha / r, nn.Dropout(dropout)
        self.a = nn.Parameter(torch.empty(r, linear.in_features).normal_(std=1 / r))
        self.b = nn.Parameter(torch.zeros(linear.out_features, r))

    def forward(self, x):
        return self.linear(x) + F.linear(F.linear(self.dropout(x), self.a), self.b) * self.scale


def add_lora(model, flags, tok):
    """Freeze the model and put LoRA beside every matrix of its blocks; with --train-marks the
    embeddings of <bot> and <eot> learn too."""
    model.requires_grad_(False)
    for block in model.h:
        for parent, name in ((block.attn, "c_attn"), (block.attn, "c_proj"), (block.mlp, "c_fc"), (block.mlp, "c_proj")):
            linear = parent[name] if isinstance(parent, nn.ModuleDict) else getattr(parent, name)
            lora = LoRA(linear, flags.lora_r, flags.lora_alpha, flags.lora_dropout)
            parent.update({name: lora}) if isinstance(parent, nn.ModuleDict) else setattr(parent, name, lora)
    if flags.train_marks:
        rows = torch.zeros_like(model.wte.weight[:, :1])
        rows[[tok.bot, tok.eot]] = 1
        model.wte.weight.requires_grad_(True)
        model.wte.weight.register_hook(lambda gradient: gradient * rows.to(gradient))


def merged(state, flags):
    """A state dict with LoRA's updates added to their matrices: that of a plain GPT2."""
    plain = {}
    for name, value in state.items():
        if name.endswith("linear.weight"):
            b, a = (state[name.replace("linear.weight", side)] for side in "ba")
            value = value + b @ a * (flags["lora_alpha"] / flags["lora_r"])
        if not name.endswith((".a", ".b")):
            plain[name.replace("linear.", "")] = value
    return plain


# ---------------------------------------------------------------- evaluation


@torch.no_grad()
def answer(model, projection, rows, tok, flags, machine):
    """Think and decode greedily. Returns token-id lists, in order, and states (B, n, C) before projection.

    Of each Sequence only what is given is read: prompt, n_latent and the first language token.
    """
    batch = data_prep.collate([s._replace(language=s.language[:1]) for s in rows], tok.eos, machine.device)
    n = batch.latent.size(1)
    with machine.autocast():
        size = batch.prompt.size(1) + n + 1 + flags.max_new
        cache = StaticCache(model.config, len(rows), size, machine.device, machine.dtype)
        x, keep, states = think(model, projection, cache, model.wte(batch.prompt), batch.keep, n)
        x = torch.cat([x, model.wte(batch.language).to(x.dtype)], 1)
        keep = None if keep is None else F.pad(keep, (0, 1), value=True)
        h = model(embeds=x, cache=cache, keep=keep, last=1)[:, -1]
        return model.decode(cache, h, flags.max_new, tok.eos), states


def evaluate(model, projection, items, rows, tok, flags, machine, batch_size=256):
    """Accuracy by real decoding, and its cost. rows: Sequences of the items.

    Each rank answers its share. Returns a dict: accuracy (0..1), n, tokens (decoded tokens, eos not
    counted, plus thoughts), rationale (those before the answer prompt; for a student its thoughts, <bot>
    and <eot>: what the paper's compression compares), seconds (per question, of one process), sample
    (text, on rank 0).
    """
    training = model.training
    model.eval(), projection.eval()
    mine = sorted(range(machine.rank, len(items), machine.world), key=lambda i: len(rows[i].prompt))
    texts, n_tokens, rationale = {}, 0, 0
    start = time.perf_counter()
    for chunk in np.array_split(mine, -(-len(mine) // batch_size)) if mine else []:
        decoded, _ = answer(model, projection, [rows[i] for i in chunk], tok, flags, machine)
        for i, ids in zip(chunk, decoded):
            texts[i], n = tok.decode(ids), rows[i].n_latent
            n_tokens += len(ids) + n
            latent = rows[i].language[0] == tok.eot
            rationale += n + 2 if latent else len(tok.encode(texts[i].rpartition(PROMPT.strip())[0]))
    seconds = (time.perf_counter() - start) / max(1, len(mine))
    right = sum(data_prep.is_correct(text, items[i]["answer"]) for i, text in texts.items())
    right, n_tokens, rationale = machine.sum(right, n_tokens, rationale)
    model.train(training), projection.train(training)
    return dict(accuracy=right / len(items), n=len(items), tokens=n_tokens / len(items), rationale=rationale / len(items),
                seconds=seconds, sample=texts.get(0))


def report(model, projection, data, tok, flags, machine):
    """Rows of the result table: student and teacher (or the one side that a baseline has) on each of
    {name: test items}. A row is what `evaluate` returns, who, data, and seconds_batch_1 (per question,
    over the first 20)."""
    found = []
    for name, items in data.items():
        examples = tokenize(items, tok, model, flags, f"{name}, test.json")
        student, teacher = zip(*(sequences(e, flags, tok) for e in examples))
        sides = [("student", student), ("teacher", teacher)] if flags.method == "codi" else [(flags.method, teacher)]
        for who, rows in sides:
            row = evaluate(model, projection, items, rows, tok, flags, machine)
            for n in (1, 20 * machine.world):                                   # the first one warms up
                row["seconds_batch_1"] = evaluate(model, projection, items[:n], rows[:n], tok, flags, machine, 1)["seconds"]
            found.append(row | dict(who=who, data=name))
    return found


def print_table(rows, flags):
    """The result, and by how much the student is shorter and faster than its teacher's words."""
    print(f"\n{flags.method}, trained on {flags.data}, seed {flags.seed}")
    line = "{:<28} {:<15} {:>6} {:>9} {:>7} {:>10} {:>12} {:>12}".format
    print(line("", "test set", "n", "accuracy", "tokens", "rationale", "ms, batch 1", "ms, batched"))
    names = dict(student=f"CODI, {flags.n_latent} thoughts", teacher="CoT, the same model", cot="CoT", **{"no-cot": "no CoT"})
    for r in rows:
        print(line(names[r["who"]], r["data"], r["n"], f"{100 * r['accuracy']:.1f} %", f"{r['tokens']:.1f}", f"{r['rationale']:.1f}",
                   f"{1000 * r['seconds_batch_1']:.1f}", f"{1000 * r['seconds']:.2f}"))
    if flags.method == "codi":
        student, teacher = rows[:2]
        print(f"compression {teacher['rationale'] / student['rationale']:.1f}x (rationale: words before the answer prompt, or "
              f"<bot>, thoughts, <eot>); tokens {teacher['tokens'] / student['tokens']:.1f}x; "
              f"speed-up at batch 1 {teacher['seconds_batch_1'] / student['seconds_batch_1']:.1f}x")


# ---------------------------------------------------------------- training


def new_optimizers(model, projection, flags):
    """AdamW for everything that learns, or Muon for the matrices of the blocks and AdamW for the rest."""
    groups, muon = model.param_groups(flags.weight_decay), []
    for group in groups:
        group["params"] = [p for p in group["params"] if p.requires_grad]
    if flags.optimizer == "muon":
        muon, groups = [Muon(groups[:1], flags.lr)], groups[1:]
    for decay, dim in ((flags.weight_decay, 2), (0.0, 1)):
        groups.append(dict(params=[p for p in projection.parameters() if p.dim() == dim], weight_decay=decay))
    return muon + [torch.optim.AdamW([g for g in groups if g["params"]], lr=flags.lr, betas=(0.9, flags.beta2), fused=True)]


def n_updates(flags, n_items):
    return flags.steps if flags.epochs is None else max(1, round(flags.epochs * -(-n_items // flags.batch_size)))


def train(model, projection, tok, data, flags, machine, resumed=None, bar=None):
    """Update by update. Returns the rows of the result table, or None if stopped.
    bar: the progress bar of a larger whole (--table)."""
    where = f"{flags.data}, {{}}.json".format
    items, rows = data["train"], None
    test = test_sets(flags, machine)         # now: a set that is missing is not to be missed after the training
    with machine.rank_0_first():
        examples = tokenize(items, tok, model, flags, where("train"))
        if flags.digits_only:
            digits = items.cached("digits", [], lambda: bytes(item["answer"][:1].isdecimal() for item in items))
            rows = np.flatnonzero(digits)
            if not len(rows):
                raise UserError(f"--digits-only: no answer in {flags.data} begins with a digit; give --no-digits-only.")
    pairs = Pairs(examples, flags, tok, where("train"), rows)
    valid = data["valid"][:flags.eval_items]
    asked = [sequences(e, flags, tok)[flags.method != "codi"] for e in tokenize(valid, tok, model, flags, where("valid"))]
    n_batches = -(-len(pairs.rows) // flags.batch_size)
    updates = n_updates(flags, len(pairs.rows))
    eval_every = flags.eval_every or n_batches
    # where the run stands: all that resuming needs beside weights and optimizers
    at = dict(done=0, loss=0.0, logged=0, best=-1.0, rows=None, seconds=0.0)
    optimizers = new_optimizers(model, projection, flags)
    if resumed:
        at = resumed["at"]
        for optimizer, state in zip(optimizers, resumed["optimizers"]):
            optimizer.load_state_dict(state)
    static = static_teacher(flags, tok, machine) if flags.teacher else None
    metrics = runtime.Metrics(os.path.join(flags.out, "metrics.jsonl"), resumed["metrics_bytes"] if resumed else 0)
    progress = runtime.Progress(updates, at, metrics, bar=bar)
    forward = torch.compile(model, dynamic=True) if flags.compile else model
    model.step = torch.compile(model.forward) if flags.compile else None
    learned = [p for group in optimizers for g in group.param_groups for p in g["params"]]
    stop, order = runtime.Stop(), None

    def save(name):
        """best.pt is a plain GPT-2, LoRA merged, that any script loads; last.pt is what resuming needs."""
        state = model.state_dict() if name == "last.pt" else merged(model.state_dict(), vars(flags))
        with machine.rank_0_first():
            if machine.rank == 0:
                runtime.save_checkpoint(os.path.join(flags.out, name), dict(
                    config=vars(model.config), tokenizer=tok.state(), flags=vars(flags), model=state,
                    projection=projection.state_dict(), optimizers=[o.state_dict() for o in optimizers],
                    at=progress.position(), metrics_bytes=metrics.size()))

    while at["done"] < updates:
        epoch, k = divmod(at["done"], n_batches)
        if order is None or k == 0:          # data order: a function of seed and epoch alone
            order = data_prep.batches(pairs.lengths, flags.batch_size, runtime.generator(flags.seed, epoch))
        chosen = order[k]
        positions, n_labels = int(pairs.positions[chosen].sum()), pairs.labels[chosen].sum(0).tolist()

        lr = SCHEDULES[flags.schedule](at["done"], updates, flags.lr, max(1, round(flags.warmup * updates)))
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group["lr"] = lr
        machine.seed(flags.seed, at["done"])
        # the whole batch's means, to which its parts add up: the loss, and of codi the three that it consists of
        losses = torch.zeros(4 if flags.method == "codi" else 1, device=machine.device)
        for rows in machine.share(chosen, flags.accumulate):
            student, teacher, colon = pairs.batch(rows, tok.eos, machine.device)
            share = (len(student.labels) / n_labels[0], len(rows) / len(chosen), len(teacher.labels) / n_labels[1])
            with machine.autocast():
                if flags.method == "codi":
                    loss, parts = codi_loss(model, projection, student, teacher, colon, flags, static, share)
                else:
                    loss, parts = share[2] * words_loss(model, teacher), {}
            loss.backward()
            losses += torch.stack([loss, *parts.values()]).detach()
        loss, *losses = machine.sum_gradients(learned, losses)
        parts = dict(zip(("student", "kd", "teacher"), losses))
        if flags.grad_clip:
            torch.nn.utils.clip_grad_norm_(learned, flags.grad_clip)
        for optimizer in optimizers:
            optimizer.step()
        model.zero_grad(set_to_none=True), projection.zero_grad(set_to_none=True)

        at["done"] += 1
        end = at["done"] == updates
        T = pairs.lengths[chosen].sum() / len(chosen)
        progress.step(loss, positions, positions * model.flops_per_token(T), end)
        if at["done"] % eval_every == 0 or end:
            v = evaluate(model, projection, valid, asked, tok, flags, machine)
            metrics.write(event="valid", update=at["done"], accuracy=v["accuracy"], n=v["n"],
                          **{name: part.item() for name, part in parts.items()})
            progress.bar.write(f"update {at['done']:>5}  validation {100 * v['accuracy']:5.1f} %" +
                               "".join(f"  {name} {part.item():.3f}" for name, part in parts.items()))
            if v["accuracy"] > at["best"]:
                at["best"] = v["accuracy"]
                save("best.pt")
        stopping = any(machine.sum(stop.asked))                 # on any rank: all end at the same update
        if stopping or (at["done"] % flags.save_every == 0 and not end):
            save("last.pt")
        if stopping:
            progress.bar.close()
            return None

    best = runtime.load_checkpoint(os.path.join(flags.out, "best.pt"))       # the table's rows are those of the best
    model, _, projection = from_checkpoint(best)
    model.to(machine.device), projection.to(machine.device)
    at["rows"] = report(model, projection, test, tok, flags, machine)
    for row in at["rows"]:
        metrics.write(event="test", seed=flags.seed, updates=at["done"], **row)
    optimizers = []
    save("last.pt")
    progress.close(machine, model.config.n_embd)
    return at["rows"]


# ---------------------------------------------------------------- main


def from_checkpoint(state, dropout=0.0):
    """Model, tokenizer and projection of a checkpoint of this project (one of coconut.py has no projection)."""
    flags, config = DEFAULTS | dict(projection=False) | state["flags"], state["config"]
    model = GPT2(GPT2Config(**config | dict(dropout=dropout)))
    projection = make_projection(argparse.Namespace(**flags), config["n_embd"])
    model.load_state_dict(merged(state["model"], flags))
    projection.load_state_dict(state.get("projection", {}))
    return model, data_prep.Tokenizer.from_state(state["tokenizer"]), projection


def static_teacher(flags, tok, machine):
    """The frozen model of --teacher."""
    model, other, _ = from_checkpoint(runtime.load_checkpoint(flags.teacher))
    if other.state() != tok.state() or (model.config.n_layer, model.config.n_embd) != (flags.n_layer, flags.n_embd):
        raise UserError(f"--teacher {flags.teacher}: has another tokenizer, depth or width than the student; train both with the "
                        "same --data, --tokenizer, --n-layer and --n-embd.")
    return model.to(machine.device).eval().requires_grad_(False)


def start_model(flags, data):
    """Model and tokenizer that a run begins with, by --init and --tokenizer."""
    if flags.init.endswith(".pt"):
        return from_checkpoint(runtime.load_checkpoint(flags.init), flags.dropout)[:2]
    if flags.init == "scratch":
        tok = data_prep.Tokenizer.gpt2() if flags.tokenizer == "gpt2" else data_prep.compact_tokenizer(
            data["train"], PROMPT, COMPACT[flags.tokenizer])
        return GPT2(GPT2Config(flags.block_size, tok.n_vocab, flags.n_layer, flags.n_head, flags.n_embd,
                               flags.dropout, flags.embd_std, flags.state_std)), tok
    tok = data_prep.Tokenizer.gpt2()
    try:
        return GPT2.from_pretrained(flags.init, flags.dropout).grow_for(tok), tok
    except (OSError, ValueError) as error:
        raise UserError(f"--init {flags.init}: no weights to be had there ({runtime.first_line(error)}); give the "
                        "path of a GPT-2 pytorch_model.bin that is at hand.") from None


def tokenize(items, tok, model, flags, where):
    return data_prep.tokenize(items, tok, model.config.block_size, 2 + flags.n_latent, where, PROMPT)


def test_sets(flags, machine):
    """{name: items}: the data's own test split, then those of --ood."""
    names = [flags.data] + [name for name in flags.ood.split(",") if name and name != "none"]
    with machine.rank_0_first():
        return {name: data_prep.load(name, need=("test",))["test"] for name in names}


def evaluate_checkpoint(flags, typed):
    """--eval-only: the table for a checkpoint, or with --ask one answer and its thoughts."""
    state = runtime.load_checkpoint(flags.eval_only)
    changed = {k: typed[k] for k in ("data", "max_new", "device", "dtype") if k in typed}
    trained = argparse.Namespace(**DEFAULTS | dict(ood=flags.ood) | state["flags"] | changed)
    trained.ood = flags.ood if "ood" in typed or "data" in typed else trained.ood
    if "n_latent" not in state["flags"]:
        raise UserError(f"{flags.eval_only} was not trained by codi.py but by coconut.py, which can evaluate it.")
    machine = runtime.Machine(trained.device, trained.dtype, state["config"]["n_embd"])
    model, tok, projection = from_checkpoint(state)
    model.to(machine.device).eval(), projection.to(machine.device).eval()
    if "ask" not in typed:
        print_table(report(model, projection, test_sets(trained, machine), tok, trained, machine), trained)
        return 0
    example = tokenize([dict(question=flags.ask, steps=[], answer="")], tok, model, trained, "--ask")[0]
    student, teacher = sequences(example, trained, tok)
    if trained.method == "codi":
        rows, states = answer(model, projection, [student], tok, trained, machine)
        for i, state in enumerate(states[0].float()):
            top = model.head(state).softmax(-1).topk(5)
            print(f"thought {i + 1}  norm {state.norm():6.2f}  " + "  ".join(
                f"{tok.decode([t])!r} {100 * p:.0f} %" for p, t in zip(top.values.tolist(), top.indices.tolist())))
        print(f"student: {tok.decode(rows[0])}")
    print(f"in words: {tok.decode(answer(model, projection, [teacher], tok, trained, machine)[0][0])}")
    return 0


def run(flags, typed, bar=None):
    """One training run, from its start or where its folder left it. Returns what `train` returns."""
    flags, resumed = runtime.open_run(flags, typed, DEFAULTS, NOT_OF_A_RUN)
    if resumed and resumed["at"]["rows"] is not None:
        return resumed["at"]["rows"]
    machine = runtime.Machine(flags.device, flags.dtype, flags.n_embd)
    flags.dtype = str(machine.dtype).removeprefix("torch.")          # resuming and evaluation must not choose again
    with machine.rank_0_first():
        data = data_prep.load(flags.data)
        torch.manual_seed(flags.seed)
        if resumed:
            model = GPT2(GPT2Config(**resumed["config"] | dict(dropout=flags.dropout)))
            tok = data_prep.Tokenizer.from_state(resumed["tokenizer"])
        else:
            model, tok = start_model(flags, data)
    projection = make_projection(flags, model.config.n_embd)
    if flags.lora_r:
        add_lora(model, flags, tok)
    if resumed:
        model.load_state_dict(resumed["model"]), projection.load_state_dict(resumed["projection"])
    flags.n_layer, flags.n_embd, flags.prompt = model.config.n_layer, model.config.n_embd, PROMPT
    model.to(machine.device), projection.to(machine.device)
    os.makedirs(flags.out, exist_ok=True)
    if bar is None:
        learned = sum(p.numel() for m in (model, projection) for p in m.parameters() if p.requires_grad)
        print(f"{machine}; {model.n_params() / 1e6:.2f} M parameters, {learned / 1e6:.2f} M learn with the projection's; vocabulary "
              f"{tok.n_vocab:,}; {len(data['train']):,} training items; writing to {flags.out}")
        print(" ".join(f"{k}={v}" for k, v in sorted(vars(flags).items()) if v is not None))
    return train(model, projection, tok, data, flags, machine, resumed, bar)


def table(flags, typed):
    """--table: every row for every seed; the paper's tables with the curves of validation beside them."""
    names = typed.get("rows", "codi,cot,no-cot").split(",")
    if any(ABLATIONS[name].get("teacher") for name in names) and "teacher" not in names:
        names.insert(0, "teacher")
    names.sort(key=lambda name: name != "teacher")                          # others distill from it
    seeds = range(flags.seed, flags.seed + typed.get("seeds", 2))
    beside = read_beside(flags.beside) if "beside" in typed else []
    machine = runtime.Machine(flags.device, flags.dtype, flags.n_embd)
    with machine.rank_0_first():
        results, updates = [], n_updates(flags, len(data_prep.load(flags.data)["train"]))
    with runtime.progress_bar(updates * len(names) * len(seeds)) as bar:
        for i, name in enumerate(names):
            found, curves = [], []
            for j, seed in enumerate(seeds, 1):
                out = os.path.join(flags.out, f"{name}-{seed}")
                bar.set_description(f"{name}, seed {seed}")
                changes = dict(ABLATIONS[name])
                if changes.get("teacher"):
                    changes["teacher"] = os.path.join(flags.out, f"teacher-{seed}", "best.pt")
                one = argparse.Namespace(**vars(flags) | changes | dict(seed=seed, out=out))
                how = "resume" if os.path.exists(os.path.join(out, "last.pt")) and "overwrite" not in typed else "overwrite"
                own = {k: v for k, v in vars(one).items() if k not in ("dtype", "n_layer", "n_embd")}
                rows = run(one, own | {how: True}, bar)
                if rows is None:
                    return None
                bar.update(updates * (i * len(seeds) + j) - bar.n)          # what a resumed run had done before
                found.append(rows)
                with open(os.path.join(out, "metrics.jsonl")) as f:
                    events = [json.loads(line) for line in f]
                curves.append([(e["update"], 100 * e["accuracy"]) for e in events if e["event"] == "valid"])
            results.append(dict(name=name, seeds=list(seeds), rows=found, curves=curves))
    lines = render(results, beside, flags)
    print("\n".join(lines))
    if machine.rank == 0:
        with open(os.path.join(flags.out, "table.md"), "w") as f:
            f.write("\n".join(lines) + "\n")
        data_prep.write_json(os.path.join(flags.out, "table.json"), dict(data=flags.data, rows=results))
    return results


def read_beside(path):
    """Rows of a table.json that coconut.py --table wrote, as lines of ours."""
    try:
        with open(path) as f:
            rows = json.load(f)["rows"]
        return [f"| {r['method']} (coconut.py) | {r['mean']:.1f} ± {r['std']:.1f} | | {r['tokens']:.1f} | "
                f"{1000 * r['seconds_batch_1']:.1f} | |" for r in rows if r["thoughts"] == "keep"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"--beside {path}: not a table.json of coconut.py --table ({runtime.first_line(error)}).") from None


def render(results, beside, flags):
    """The lines of --table: accuracy with the teacher's beside it, cost, other test sets, learning curves."""
    def spread(values):
        values = [100 * v for v in values]
        return f"{np.mean(values):.1f}" + (f" ± {np.std(values, ddof=1):.1f}" if len(values) > 1 else "")

    first = results[0]["rows"][0]
    sets = [row["data"] for row in first if row["who"] == first[0]["who"]]
    updates = [u for u, _ in results[0]["curves"][0]]
    columns = ["method", "accuracy, %", "its teacher in words, %", "tokens", "ms per question, batch 1", *sets[1:]]
    lines = [f"{flags.data}, {first[0]['n']:,} test questions, {updates[-1]:,} updates, "
             f"seeds {', '.join(map(str, results[0]['seeds']))}", "",
             "| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    for r in results:
        own = [[row for row in rows if row["who"] == rows[0]["who"]] for rows in r["rows"]]          # per seed, per test set
        words = [row["accuracy"] for rows in r["rows"] for row in rows if row["who"] == "teacher" and row["data"] == sets[0]]
        accuracy = [spread([rows[i]["accuracy"] for rows in own]) for i in range(len(sets))]
        tokens, seconds = ([rows[0][name] for rows in own] for name in ("tokens", "seconds_batch_1"))
        lines.append("| " + " | ".join([r["name"], accuracy[0], spread(words) if words else "", f"{np.mean(tokens):.1f}",
                                        f"{1000 * np.median(seconds):.1f}", *accuracy[1:]]) + " |")
    lines += [*beside, "", "| validation after updates | " + " | ".join(f"{u:,}" for u in updates) + " |", "|---" * (len(updates) + 1) + "|"]
    for r in results:
        points = np.mean([[v for _, v in curve] for curve in r["curves"]], axis=0)
        lines.append(f"| {r['name']} | " + " | ".join(f"{v:.1f}" for v in points) + " |")
    return lines


def main(argv=None):
    flags, typed = parse_flags(argv)
    if "eval_only" in typed:
        return evaluate_checkpoint(flags, typed)
    rows = table(flags, typed) if "table" in typed else run(flags, typed)
    if rows is None:
        print("stopped; " + ("the same command goes on" if "table" in typed else
                             f"continue with: python codi.py --resume --out {flags.out}"))
        return 130
    if "table" not in typed:
        print_table(rows, flags)
    return 0


if __name__ == "__main__":
    runtime.run_main(main, data_prep.DataError)
