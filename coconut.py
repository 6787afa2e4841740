"""Coconut: Chain of Continuous Thought (Hao et al. 2024, arXiv 2412.06769).

A language model that reasons in words feeds its last token back; Coconut feeds back the last hidden
state, h = ln_f(...) at the last position, as the next input embedding. Between <bot> and <eot>:

    E = [e(x1) .. e(xT), e(<bot>), h_T+1, h_T+2, .. h_T+k, e(<eot>), e(language) ..]        (section 3.1)

A curriculum moves the reasoning over: at stage s the first s reasoning steps are replaced by s * c
continuous thoughts, and the loss counts only the language that remains (figure 2, section 3.2):

    stage 0   question <bot> <eot> step 1  step 2  step 3  answer
    stage 1   question <bot> o <eot>       step 2  step 3  answer        o: c thoughts
    stage 3   question <bot> o o o <eot>                   answer

Read on in this order: curriculum, think, read_on, train, answer.
    python coconut.py --stage-max 3 --c 1
"""

import argparse
import os
import re
import time

import numpy as np
import torch
import torch.nn.functional as F

import data_prep
import runtime
from data_prep import Sequence
from gpt2 import GPT2, GPT2Config, GrowingCache, Muon, PRESETS, StaticCache
from runtime import UserError

METHODS = {                          # name -> what replaces reasoning in words (table 1, and two controls)
    "coconut": "continuous thoughts, by the curriculum",
    "cot": "nothing: all steps in words",
    "no-cot": "nothing: the answer at once",
    "icot": "language tokens are removed from the front, some at a time (Deng et al. 2024)",
    "pause": "as many learned <pause> tokens, without curriculum",
    "pause-as-thought": "<pause> tokens, by the curriculum",
    "pause-multipass": "the same, read one pass each as thoughts are",
    "no-thought": "the curriculum alone",
    "no-curriculum": "thoughts, trained at the last stage only",
}
ONE_STAGE = ("cot", "no-cot", "pause", "no-curriculum")
FEEDS_BACK = ("coconut", "no-curriculum")                   # methods whose thoughts are hidden states
CONTROLS = ("keep", "zero", "noise", "shuffle", "swap")     # --thoughts; what they do: control
COMPACT = {"compact": "numbers-apart", "compact-gpt2": "gpt2", "compact-is-a": "is-a"}      # flag -> pattern
NOT_OF_A_RUN = ("resume", "out", "device", "compile", "accumulate", "overwrite", "recipe", "table", "methods", "seeds")

# ---------------------------------------------------------------- flags

DEFAULTS = dict(                     # the embedded data: minutes on two CPU cores
    method="coconut", data="chains", stage_max=3, c=1, init="scratch", n_layer=2, n_head=8, n_embd=128,
    embd_std=0.1, state_std=0.1, block_size=128, dropout=0.0, steps_stage_0=600, steps_per_stage=550, steps_last=1000,
    batch_size=32, optimizer="muon", lr=2e-3, weight_decay=0.1, beta2=0.95, warmup=20, lr_decay=0.4, grad_clip=1.0,
    uniform_prob=0.3, stage_mix="uniform", switch="fixed", icot_tokens=4, icot_smoothing=4.0, reset_optimizer=False,
    drop_last_steps=False, plain_stage_0=False, seed=0,
    accumulate=1, device="auto", dtype="auto", compile=False, eval_every=200, eval_items=200, max_new=64, save_every=500,
    thoughts="keep", calculator=False)
PAPER = dict(                        # section 4.2 and the authors' configuration files
    init="gpt2", embd_std=0.02, state_std=1.0, block_size=1024, dropout=0.1, batch_size=128,
    optimizer="adamw", lr=1e-4, weight_decay=0.01, beta2=0.999, warmup=0, lr_decay=0.0, grad_clip=0.0,
    uniform_prob=0.0, reset_optimizer=True, icot_tokens=8, eval_every=0, eval_items=10**9, max_new=128)
RECIPES = {
    "chains": dict(data="chains"),
    "prosqa-mini": dict(data="prosqa-mini", block_size=256, n_head=4, tokenizer="compact-is-a", plain_stage_0=True, c=2,
                        warmup=150, lr_decay=0.2, steps_stage_0=1500, steps_per_stage=500, steps_last=1200, eval_every=300),
    **{name: PAPER | dict(data=name, stage_max=6, c=1, epochs_stage_0=5, epochs_per_stage=5, epochs_last=20)
       for name in ("prosqa", "prontoqa")},
    "gsm8k": PAPER | dict(data="gsm8k", stage_max=3, c=2, epochs_stage_0=6, epochs_per_stage=3, epochs_last=35,
                          drop_last_steps=True, plain_stage_0=True),
}


def parse_flags(argv=None):
    """Flags, filled up from the recipe: defaults < recipe < what was typed. Also returns the typed ones."""
    p = argparse.ArgumentParser(usage="python coconut.py [flags], --help lists them", description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter,
                                epilog="Defaults are those of the recipe; each run prints its flags.")
    add, count, real = p.add_argument, data_prep.at_least, data_prep.real
    add("--method", choices=METHODS, help="what takes the place of steps in words: " + "; ".join(
        f"{name}: {what}" for name, what in METHODS.items()))
    add("--recipe", choices=RECIPES, help="a set of defaults; chosen by --data where one has that name")
    add("--data", help="data set: a name under data/ (chains and prosqa-mini are made if absent) or a folder")
    add("--stage-max", type=count(0), help="last stage: how many reasoning steps become thoughts")
    add("--c", type=count(1), help="continuous thoughts per replaced step")
    add("--init", help=f"scratch, {', '.join(PRESETS)}, a pytorch_model.bin, or a checkpoint of this project")
    add("--n-layer", type=count(1), help="layers, from scratch")
    add("--n-head", type=count(1), help="attention heads, from scratch")
    add("--n-embd", type=count(1), help="width, from scratch")
    add("--embd-std", type=real(), help="initial spread of the embeddings, from scratch (GPT-2: 0.02)")
    add("--state-std", type=real(), help="initial spread of the states fed back: gain of ln_f, from scratch (GPT-2: 1)")
    add("--block-size", type=count(8), help="most positions in a sequence, from scratch")
    add("--tokenizer", choices=(*COMPACT, "gpt2"), help="compact: built from the data, numbers apart from spaces; "
        "compact-gpt2: the same with GPT-2's split; compact-is-a: with ' is a' joined to the word before")
    add("--dropout", type=real(1), help="dropout, everywhere that GPT-2 has it")
    for part, what in (("stage-0", "of stage 0 (all in words)"), ("per-stage", "of each stage between"),
                       ("last", "of the last stage")):
        add(f"--steps-{part}", type=count(0), help=f"updates {what}")
        add(f"--epochs-{part}", type=real(), help=f"the same in passes over the training data")
    add("--batch-size", type=count(1), help="questions per update, those of all processes together")
    add("--accumulate", type=count(1), help="read each process's share of an update in that many parts, to save memory")
    add("--optimizer", choices=("adamw", "muon"), help="muon: Muon for the blocks' matrices, AdamW for the rest")
    add("--lr", type=real(), help="peak learning rate")
    add("--lr-decay", type=real(1), help="last share of each stage over which the rate falls to 0 (0: constant)")
    add("--warmup", type=count(0), help="updates of linear warm-up in each stage")
    add("--weight-decay", type=real(), help="AdamW weight decay, on matrices only")
    add("--beta2", type=real(1), help="AdamW beta 2")
    add("--grad-clip", type=real(), help="largest gradient norm (0: no clipping)")
    add("--uniform-prob", type=real(1), help="share of items trained at a random stage (stage mixing, section 5)")
    add("--stage-mix", choices=("uniform", "linear"), help="that stage is any one alike, or stage i with weight i + 1")
    add("--switch", choices=("fixed", "classifier"), help="what ends thinking: the number of thoughts, or a linear "
        "head on the thought, trained beside and stopping early at decoding (section 3.1)")
    add("--icot-tokens", type=count(1), help="language tokens that icot removes at a time")
    add("--icot-smoothing", type=real(), help="icot removes o more tokens with probability ~ exp(-this * o) (0: none)")
    add("--reset-optimizer", action=argparse.BooleanOptionalAction, help="new optimizer at each stage")
    add("--drop-last-steps", action=argparse.BooleanOptionalAction,
        help="one more stage: all language steps go, thoughts stay at stage-max * c (the paper on GSM8k)")
    add("--plain-stage-0", action=argparse.BooleanOptionalAction, help="stage 0 is CoT: no <bot> <eot> "
        "(the paper on GSM8k), no mixing")
    add("--seed", type=count(0), help="of weights, data order and dropout")
    add("--device", help="auto, cpu, cuda, cuda:1, mps")
    add("--dtype", choices=("auto", "float32", "bfloat16"), help="of matrix products; auto: what is fast here")
    add("--compile", action=argparse.BooleanOptionalAction, help="torch.compile (slow start, fast run)")
    add("--eval-every", type=count(0), help="updates between validations (0: once per epoch)")
    add("--eval-items", type=count(1), help="validation items used")
    add("--max-new", type=count(1), help="most tokens decoded per answer")
    add("--save-every", type=count(1), help="updates between checkpoints")
    add("--out", help="folder of checkpoints and metrics (default: out/DATA-METHOD-SEED)")
    add("--resume", action="store_true", default=None, help="continue the run in --out with its own flags")
    add("--overwrite", action="store_true", default=None, help="start again in an --out that holds a run")
    add("--thoughts", choices=CONTROLS, help="with --eval-only: put zeros, noise of the "
        "same mean and spread, the thoughts in another order, or another question's in place of the thoughts")
    add("--calculator", action=argparse.BooleanOptionalAction, help="decoding: compute what stands between << and =")
    add("--table", action="store_true", default=None, help="train every method for every seed, as far as --out does not "
        "hold them already, and print the paper's table 1")
    add("--methods", help="--table: the methods, with commas (default: all)")
    add("--seeds", type=count(1), help="--table: how many seeds, from --seed up (default 3)")
    add("--eval-only", metavar="CKPT", help="no training: evaluate a checkpoint on --data's test split")
    add("--ask", metavar="QUESTION", help="no training: answer one question with --eval-only's model")
    typed = {k: v for k, v in vars(p.parse_args(argv)).items() if v is not None}
    for part in ("stage_0", "per_stage", "last"):
        if f"steps_{part}" in typed and f"epochs_{part}" in typed:
            p.error(f"--steps-{part} and --epochs-{part} exclude each other: give one".replace("_", "-"))
    recipe = typed.get("recipe", typed.get("data"))
    flags = argparse.Namespace(**DEFAULTS | RECIPES.get(recipe, {}) | typed)
    for part in ("stage_0", "per_stage", "last"):        # epochs of a recipe or typed ones beat default steps
        if f"steps_{part}" in typed or not hasattr(flags, f"epochs_{part}"):
            setattr(flags, f"epochs_{part}", None)
    flags.tokenizer = getattr(flags, "tokenizer", "compact" if flags.init == "scratch" else "gpt2")
    flags.out = getattr(flags, "out", os.path.join("out", os.path.basename(os.path.normpath(flags.data)) + (
        "-table" if "table" in typed else f"-{flags.method}-{flags.seed}")))
    for method in typed.get("methods", "cot").split(","):
        if method not in METHODS:
            p.error(f"--methods: there is no {method!r}; choose among {', '.join(METHODS)}")
    if flags.init == "scratch" and flags.n_embd % flags.n_head:
        p.error(f"--n-embd {flags.n_embd} is not a multiple of --n-head {flags.n_head}: change one of them")
    if flags.init != "scratch" and "tokenizer" in typed:
        p.error("--tokenizer is for --init scratch: released weights and checkpoints have their own")
    for name in ("ask", "thoughts"):
        if name in typed and "eval_only" not in typed:
            p.error(f"--{name} needs a trained model: add --eval-only CKPT")
    if "table" in typed and typed.keys() & {"resume", "method", "eval_only"}:
        p.error("--table goes on by itself and trains --methods: leave out --resume, --method and --eval-only")
    if flags.switch == "classifier" and flags.method not in (*FEEDS_BACK, "pause-multipass"):
        p.error(f"--switch classifier ends continuous thoughts, and --method {flags.method} has none: leave it out")
    if not typed.get("ask", "x").strip():
        p.error("--ask is empty: type a question")
    return flags, typed


# ---------------------------------------------------------------- the method


def curriculum(example, stage, c, stage_max, method, tok, plain_stage_0=False):
    """What one example looks like at one stage (figure 2): a Sequence.

    stage 0 keeps every step, stage s has the first s steps replaced by s * c thoughts (or <pause>
    tokens, or nothing), and stage_max + 1 drops all steps with thoughts still stage_max * c (the
    paper's extra stage). For icot, stage is the number of language tokens removed from the front.
    An example with fewer steps than `stage` gets as many thoughts as the others: their number
    must not tell how long the solution is.
    """
    question, steps, answer = example
    left = steps[stage:] if stage <= stage_max else []
    left = {"cot": steps, "no-cot": [], "pause": [], "icot": [sum(steps, [])[stage:]]}.get(method, left)
    language = sum(left, []) + answer
    plain = plain_stage_0 and stage == 0 and method not in ONE_STAGE
    if plain or method in ("cot", "no-cot", "icot", "no-thought"):
        return Sequence(question[:-1], 0, question[-1:] + language)
    n = (stage_max if method == "pause" else min(stage, stage_max)) * c
    if method in ("pause", "pause-as-thought"):                  # tokens like others: all in one pass
        return Sequence(question + [tok.bot] + n * [tok.pause], 0, [tok.eot] + language)
    return Sequence(question + [tok.bot], n, [tok.eot] + language)


def sequence_of(example, stage, flags, tok):
    return curriculum(example, stage, flags.c, flags.stage_max, flags.method, tok, flags.plain_stage_0)


def training_sequence(example, stage, flags, tok, rng):
    """The same with what only training has: stage mixing (section 5; a plain stage 0 is not mixed, and
    has <bot> <eot> when mixed into a later one), icot's random extra removal, and for --switch classifier
    as many thoughts as the example has steps to replace."""
    plain = flags.plain_stage_0 and stage == 0
    if flags.method == "icot":
        stage += int(rng.exponential(1 / flags.icot_smoothing)) if flags.icot_smoothing else 0
    elif flags.method not in ONE_STAGE and not plain and rng.random() < flags.uniform_prob:
        n = min(len(example.steps), flags.stage_max) + 1
        linear = np.arange(1, n + 1) / sum(range(n + 1))
        stage = int(rng.integers(n) if flags.stage_mix == "uniform" else rng.choice(n, p=linear))
    sequence = curriculum(example, stage, flags.c, flags.stage_max, flags.method, tok, plain)
    if flags.switch == "classifier":
        sequence = sequence._replace(n_latent=min(sequence.n_latent, max(1, len(example.steps)) * flags.c))
    return sequence


def lengths(examples, stage, flags):
    """(n, 2): the tokens of question and language that curriculum leaves each of the Examples, <bot>, <eot> and
    the like not counted: what makes items alike, for batches."""
    question, steps, answer = examples.lengths                            # (n,), (n, most steps), (n,)
    left = steps[:, stage:].sum(1) if stage <= flags.stage_max else 0
    words = steps.sum(1)
    left = {"cot": words, "no-cot": 0, "pause": 0, "icot": (words - stage).clip(0)}.get(flags.method, left)
    return np.stack([question, left + answer], 1)


def think(model, cache, prompt, keep, latent, fixed=None, switch=None):
    """Read the prompt, then feed the last hidden state back as the next input, k times.

    prompt (B, T) token ids, left-padded; keep (B, T) bool, real positions; latent (B, k) bool, the
    thoughts each row has: all rows take k passes, thoughts a row has not are padding to it.
    fixed (C,): feed this embedding instead (pause-multipass). switch: a classifier that ends a row's
    thoughts early; `latent` is changed to what the row then had.

    Returns x (B, t, C) and keep (B, t), what is still to be read (the last thought, or the whole
    prompt if there are no thoughts), and the thoughts (B, k, C). So k thoughts cost k passes here
    and one in read_on: the paper's n + 1.
    """
    x, thoughts = model.wte(prompt), []
    for i in range(latent.size(1)):
        h = model(embeds=x, cache=cache, keep=keep, last=1)             # (B, 1, C)
        thoughts.append(h)
        x, keep = h if fixed is None else fixed.expand_as(h), latent[:, i:i + 1]
        if switch is not None:
            latent[:, i + 1:] &= switch(h[:, 0]) < 0
            if not latent[:, i + 1:].any():
                break
    return x, keep, torch.cat(thoughts, 1) if thoughts else x[:, :0]


def read_on(model, cache, x, keep, language):
    """Read what think left over and then language (B, T); the states (B, T, C) that predict what follows."""
    T = language.size(1)
    x = torch.cat([x, model.wte(language).to(x.dtype)], 1)
    keep = torch.cat([keep, torch.ones_like(language, dtype=torch.bool)], 1)
    return model(embeds=x, cache=cache, keep=keep, last=T)


def coconut_loss(model, batch, fixed=None):
    """Mean cross-entropy over the batch's label tokens, and the thoughts (B, k, C).

    Gradients flow through every thought and through the cached keys and values to the question.
    Labels are the language after its first token; question, <bot>, thoughts, <eot> have none.
    """
    cache = GrowingCache()
    x, keep, thoughts = think(model, cache, batch.prompt, batch.keep, batch.latent, fixed)
    h = read_on(model, cache, x, keep, batch.language)
    logits = model.head(h.flatten(0, 1)[batch.where])                     # (N, V), label positions only
    return F.cross_entropy(logits.float(), batch.labels), thoughts


def switch_loss(switch, thoughts, latent):
    """Binary cross-entropy of the classifier: is this thought, of those a row has, its last?"""
    last = latent & ~F.pad(latent[:, 1:], (0, 1))
    return F.binary_cross_entropy_with_logits(switch(thoughts)[latent][:, 0].float(), last[latent].float())


# ---------------------------------------------------------------- evaluation


@torch.no_grad()
def answer(model, sequences, tok, flags, machine):
    """Think and decode greedily. Returns token-id lists, in order, thoughts (B, k, C), latent (B, k).

    Of each Sequence only what is given is read: prompt, n_latent and the first language token.
    """
    batch = data_prep.collate([s._replace(language=s.language[:1]) for s in sequences], tok.eos, machine.device)
    size = batch.prompt.size(1) + batch.latent.size(1) + 1 + flags.max_new
    fixed = model.wte.weight[tok.pause] if flags.method == "pause-multipass" else None
    with machine.autocast():
        cache = StaticCache(model.config, len(sequences), size, machine.device, machine.dtype)
        x, keep, thoughts = think(model, cache, batch.prompt, batch.keep, batch.latent, fixed, model.switch)
        latent = batch.latent[:, :thoughts.size(1)]
        if flags.thoughts != "keep":                       # read it all again, with other thoughts
            cache = StaticCache(model.config, len(sequences), size, machine.device, machine.dtype)
            x = torch.cat([model.wte(batch.prompt), control(thoughts, flags.thoughts, flags.seed)], 1)
            keep = torch.cat([batch.keep, latent], 1)
        h = read_on(model, cache, x, keep, batch.language)[:, -1]
        edit = Calculator(tok, len(sequences)) if flags.calculator else None
        return model.decode(cache, h, flags.max_new, tok.eos, edit=edit), thoughts, latent


def control(thoughts, kind, seed):
    """Thoughts (B, k, C) -> what is read in their place: does what the model thought matter?

    zero; noise, normal with the mean and standard deviation of each thought; shuffle, each thought
    at another of the k positions; swap, those of the question before in the batch.
    """
    if kind == "zero":
        return torch.zeros_like(thoughts)
    if kind == "noise":
        normal = torch.randn(thoughts.shape, generator=torch.Generator().manual_seed(seed)).to(thoughts)
        return thoughts.mean(-1, keepdim=True) + thoughts.std(-1, keepdim=True) * normal
    if kind == "shuffle":
        k = thoughts.size(1)
        return thoughts.roll(1 + seed % (k - 1) if k > 1 else 0, 1)
    return thoughts.roll(1, 0)


class Calculator:
    """Computes what a model writes between << and = and goes on with the result (GSM8k's annotations)."""

    def __init__(self, tok, B):
        self.tok, self.rows, self.due = tok, [[] for _ in range(B)], [[] for _ in range(B)]

    def __call__(self, tokens):
        """The next tokens (B,), chosen by the model -> those that are to stand there."""
        tokens = tokens.tolist()
        for b, row in enumerate(self.rows):
            if self.due[b]:
                tokens[b] = self.due[b].pop(0)
            row.append(tokens[b])
            if not self.due[b] and (asked := re.search(r"<<([^<>=]*)=$", self.tok.decode(row[-40:]))):
                result = data_prep.calculate(asked[1])
                self.due[b] = self.tok.encode(result + ">>") if result else []
        return torch.tensor(tokens)


def evaluate(model, items, examples, stage, flags, tok, machine, batch_size=256):
    """Accuracy by real decoding, and its cost.

    Each rank answers its share. Returns a dict: accuracy (0..1), n, tokens (decoded tokens, eos not
    counted, plus thoughts: the paper's "# tokens"), seconds (per question, of one process), sample
    (text, on rank 0), thought_norms (mean L2 norm of the 1st, 2nd .. thought).
    """
    was_training = model.training
    model.eval()
    sequences = [sequence_of(e, stage, flags, tok) for e in examples]
    mine = sorted(range(machine.rank, len(items), machine.world), key=lambda i: len(sequences[i].prompt))
    k = sequences[0].n_latent
    texts, n_tokens, norms, rows_with = {}, 0, torch.zeros(k), torch.zeros(k)
    start = time.perf_counter()
    for chunk in np.array_split(mine, -(-len(mine) // batch_size)) if mine else []:
        rows, thoughts, latent = answer(model, [sequences[i] for i in chunk], tok, flags, machine)
        norms[:latent.size(1)] += (thoughts.float().norm(dim=-1) * latent).sum(0).cpu()
        rows_with[:latent.size(1)] += latent.sum(0).cpu()
        n_tokens += sum(map(len, rows)) + int(latent.sum())
        for i, row in zip(chunk, rows):
            texts[i] = tok.decode(row)
    seconds = (time.perf_counter() - start) / max(1, len(mine))
    right = sum(data_prep.is_correct(text, items[i]["answer"]) for i, text in texts.items())
    right, n_tokens, *sums = machine.sum(right, n_tokens, *norms.tolist(), *rows_with.tolist())
    model.train(was_training)
    return dict(accuracy=right / len(items), n=len(items), tokens=n_tokens / len(items), seconds=seconds,
                sample=texts.get(0), thought_norms=[round(norm / max(1, n), 3) for norm, n in zip(sums[:k], sums[k:])])


def report(model, data, examples, stage, flags, tok, machine):
    """One row of the result table, on the test split: what `evaluate` returns and
    seconds_batch_1 (per question, over the first 20), n_latent, step_tokens (still in words)."""
    items, test = data["test"], examples["test"]
    row = evaluate(model, items, test, stage, flags, tok, machine)
    for n in (1, 20 * machine.world):                                       # the first one warms up
        row["seconds_batch_1"] = evaluate(model, items[:n], test[:n], stage, flags, tok, machine, batch_size=1)["seconds"]
    sequences = [sequence_of(e, stage, flags, tok) for e in test]
    return row | dict(stage=stage, n_latent=sequences[0].n_latent, step_tokens=sum(
        len(s.language) - 1 - len(e.answer) for s, e in zip(sequences, test)) / len(test))


def print_table(rows, flags):
    """The result: one line per stage."""
    line = "{:>5} {:>9} {:>14} {:>10} {:>8} {:>14} {:>14}".format
    print(f"\n{flags.method} on {flags.data}, {rows[0]['n']} test questions")
    print(line("stage", "thoughts", "tokens of steps", "accuracy", "tokens", "ms, batch 1", "ms, batched"))
    for r in rows:
        print(line(r["stage"], r["n_latent"], f"{r['step_tokens']:.1f}", f"{100 * r['accuracy']:.1f} %", f"{r['tokens']:.1f}",
                   f"{1000 * r['seconds_batch_1']:.1f}", f"{1000 * r['seconds']:.2f}"))


# ---------------------------------------------------------------- training


def stages(flags, n_batches, longest=0):
    """The schedule: a list of (stage, updates). A baseline without stages gets the same sum of updates;
    icot removes its tokens, `longest` in all, over the updates of the stages between."""
    def updates(part):
        epochs = getattr(flags, f"epochs_{part}")
        return getattr(flags, f"steps_{part}") if epochs is None else round(epochs * n_batches)
    last = flags.stage_max + flags.drop_last_steps
    plan = [(s, updates("stage_0" if s == 0 else "per_stage")) for s in range(last)] + [(last, updates("last"))]
    if flags.method in ONE_STAGE:
        return [(last if flags.method == "no-curriculum" else 0, sum(n for _, n in plan))]
    if flags.method == "icot":
        removed = range(flags.icot_tokens, longest, flags.icot_tokens)
        ends = np.linspace(0, sum(n for _, n in plan[1:-1]), len(removed) + 1).astype(int)
        return plan[:1] + list(zip(removed, np.diff(ends).tolist())) + [(longest, plan[-1][1])]
    return plan


def last_stage(flags):
    """The stage that a trained model is evaluated at; for icot any number of tokens that leaves none."""
    return stages(flags, 1, flags.block_size)[-1][0]


def new_optimizers(model, flags):
    """AdamW for everything, or Muon for the matrices of the blocks and AdamW for the rest."""
    groups, muon = model.param_groups(flags.weight_decay), []
    if flags.optimizer == "muon":
        muon, groups = [Muon(groups[:1], flags.lr)], groups[1:]
    return muon + [torch.optim.AdamW(groups, lr=flags.lr, betas=(0.9, flags.beta2), fused=True)]


def train(model, tok, data, examples, flags, machine, resumed=None, bar=None):
    """The curriculum, update by update. Returns the rows of the result table, or None if stopped.
    bar: the progress bar of a larger whole (--table)."""
    n_train = len(examples["train"])
    n_batches = -(-n_train // flags.batch_size)
    eval_every = flags.eval_every or n_batches
    plan = stages(flags, n_batches, int(examples["train"].lengths.steps.sum(1).max()))
    # where the run stands: all that resuming needs beside weights and optimizers
    at = dict(part=0, parts=len(plan), update=0, done=0, loss=0.0, logged=0, best=-1.0, rows=[], seconds=0.0)
    optimizers = new_optimizers(model, flags)
    if resumed:
        at = resumed["at"]
        for optimizer, state in zip(optimizers, resumed["optimizers"]):
            optimizer.load_state_dict(state)
    metrics = runtime.Metrics(os.path.join(flags.out, "metrics.jsonl"), resumed["metrics_bytes"] if resumed else 0)
    progress = runtime.Progress(sum(n for _, n in plan), at, metrics, bar=bar)
    forward = torch.compile(model, dynamic=True) if flags.compile else model
    model.step = torch.compile(model.forward) if flags.compile else None
    stop, reset = runtime.Stop(), flags.reset_optimizer or flags.method == "icot"

    def save(name):
        with machine.rank_0_first():
            if machine.rank == 0:
                runtime.save_checkpoint(os.path.join(flags.out, name), dict(
                    config=vars(model.config), tokenizer=tok.state(), flags=vars(flags), model=model.state_dict(),
                    optimizers=[o.state_dict() for o in optimizers], at=progress.position(), metrics_bytes=metrics.size()))

    while at["part"] < len(plan):
        (stage, updates), last_part = plan[at["part"]], at["part"] == len(plan) - 1
        if reset and at["update"] == 0:
            optimizers = new_optimizers(model, flags)
        order = None
        while at["update"] < updates:
            epoch, k = divmod(at["update"], n_batches)
            if order is None or k == 0:      # data order: a function of seed, stage and epoch alone
                order = data_prep.batches(lengths(examples["train"], stage, flags), flags.batch_size,
                                          runtime.generator(flags.seed, stage, epoch))
            chosen = [examples["train"][i] for i in order[k]]
            mix = runtime.generator(flags.seed, stage, epoch, k)
            sequences = [training_sequence(e, stage, flags, tok, mix) for e in chosen]
            positions = sum(len(s.prompt) + s.n_latent + len(s.language) for s in sequences)
            n_labels, n_thoughts = sum(len(s.language) - 1 for s in sequences), sum(s.n_latent for s in sequences)

            lr = runtime.learning_rate(at["update"], updates, flags.lr, flags.warmup, flags.lr_decay)
            for group in (group for optimizer in optimizers for group in optimizer.param_groups):
                group["lr"] = lr
            machine.seed(flags.seed, at["done"])
            loss = torch.zeros((), device=machine.device)       # the whole batch's mean, to which the parts add up
            for part in machine.share(sequences, flags.accumulate):
                batch = data_prep.collate(part, tok.eos, machine.device)
                fixed = model.wte.weight[tok.pause] if flags.method == "pause-multipass" else None
                with machine.autocast():
                    part_loss, thoughts = coconut_loss(forward, batch, fixed)
                    part_loss = part_loss * (len(batch.labels) / n_labels)
                    if flags.switch == "classifier" and thoughts.size(1):
                        ends = switch_loss(model.switch, thoughts, batch.latent)
                        part_loss = part_loss + ends * (batch.latent.sum() / n_thoughts)
                part_loss.backward()
                loss += part_loss.detach()
            loss = machine.sum_gradients(model.parameters(), loss)
            if flags.grad_clip:
                torch.nn.utils.clip_grad_norm_(model.parameters(), flags.grad_clip)
            for optimizer in optimizers:
                optimizer.step()
            model.zero_grad(set_to_none=True)

            at["update"] += 1
            at["done"] += 1
            end = at["update"] == updates
            progress.step(loss, positions, positions * model.flops_per_token(positions / len(chosen)), end, stage=stage)
            if at["update"] % eval_every == 0 or end:
                v = evaluate(model, data["valid"][:flags.eval_items], examples["valid"][:flags.eval_items],
                             stage, flags, tok, machine)
                metrics.write(event="valid", stage=stage, update=at["done"], accuracy=v["accuracy"], n=v["n"])
                progress.bar.write(f"update {at['done']:>5}  stage {stage}  validation {100 * v['accuracy']:5.1f} %")
                if last_part and v["accuracy"] > at["best"]:
                    at["best"] = v["accuracy"]
                    save("best.pt")
            stopping = any(machine.sum(stop.asked))             # on any rank: all end at the same update
            if stopping or (at["done"] % flags.save_every == 0 and not end):
                save("last.pt")
            if stopping:
                progress.bar.close()
                return None

        if last_part:                        # the table's last row is that of the best checkpoint
            model.load_state_dict(runtime.load_checkpoint(os.path.join(flags.out, "best.pt"))["model"])
        row = report(model, data, examples, stage, flags, tok, machine)
        at["rows"].append(row)
        metrics.write(event="stage", **row)
        embeddings = model.wte.weight.norm(dim=1).mean().item()
        progress.bar.write(f"stage {stage} is done; it writes {row['sample']!r}; norm of token embeddings {embeddings:.2f}, "
                           f"of thoughts {', '.join(f'{n:.2f}' for n in row['thought_norms']) or '(none)'}")
        if last_part:
            metrics.write(event="final", method=flags.method, data=flags.data, stage=stage, n_latent=row["n_latent"],
                          test_accuracy=row["accuracy"], test_n=row["n"], tokens=row["tokens"], updates=at["done"],
                          seed=flags.seed, seconds=progress.seconds())
        at["part"], at["update"] = at["part"] + 1, 0
        save("last.pt")
    progress.close(machine, model.config.n_embd)
    return at["rows"]


# ---------------------------------------------------------------- main


def from_checkpoint(state, dropout=0.0):
    """Model and tokenizer of a checkpoint of this project."""
    model = GPT2(GPT2Config(**state["config"] | dict(dropout=dropout)))
    model.load_state_dict(state["model"])
    return model, data_prep.Tokenizer.from_state(state["tokenizer"])


def trained_model(path, changed):
    """(model, tokenizer, flags of its run, machine) of a checkpoint, to evaluate with some flags changed."""
    state = runtime.load_checkpoint(path)
    if "n_latent" in state["flags"]:
        raise UserError(f"{path} was trained by codi.py, which can evaluate it.")
    trained = argparse.Namespace(**DEFAULTS | state["flags"] | changed)
    machine = runtime.Machine(trained.device, trained.dtype, state["config"]["n_embd"])
    model, tok = from_checkpoint(state)
    return model.to(machine.device).eval(), tok, trained, machine


def start_model(flags, data):
    """Model and tokenizer that a run begins with, by --init and --tokenizer."""
    if flags.init.endswith(".pt"):
        return from_checkpoint(runtime.load_checkpoint(flags.init), flags.dropout)
    if flags.init == "scratch":
        tok = data_prep.Tokenizer.gpt2() if flags.tokenizer == "gpt2" else data_prep.compact_tokenizer(
            data["train"], "### ", COMPACT[flags.tokenizer])
        return GPT2(GPT2Config(flags.block_size, tok.n_vocab, flags.n_layer, flags.n_head, flags.n_embd,
                               flags.dropout, flags.embd_std, flags.state_std)), tok
    tok = data_prep.Tokenizer.gpt2()
    try:
        return GPT2.from_pretrained(flags.init, flags.dropout).grow_for(tok), tok
    except (OSError, ValueError) as error:
        raise UserError(f"--init {flags.init}: no weights to be had there ({runtime.first_line(error)}); give the "
                        "path of a GPT-2 pytorch_model.bin that is at hand.") from None


def tokenize(data, tok, model, flags):
    extra = 2 + flags.stage_max * flags.c
    return {split: data_prep.tokenize(items, tok, model.config.block_size, extra, f"{flags.data}, {split}.json")
            for split, items in data.items()}


def evaluate_checkpoint(flags, typed):
    """--eval-only: the table's last line for a checkpoint, or with --ask one answer and its thoughts."""
    changed = {k: typed[k] for k in ("data", "max_new", "device", "dtype", "thoughts", "calculator") if k in typed}
    model, tok, trained, machine = trained_model(flags.eval_only, changed)
    stage = last_stage(trained)
    if trained.thoughts != "keep" and trained.method not in FEEDS_BACK:
        raise UserError(f"--thoughts {trained.thoughts}: --method {trained.method} of {flags.eval_only} has no thoughts to "
                        "replace.")
    if trained.thoughts == "swap" and "ask" in typed:
        raise UserError("--thoughts swap needs other questions; leave out --ask.")
    if "ask" not in typed:
        with machine.rank_0_first():
            data = data_prep.load(trained.data, need=("test",))
        examples = tokenize({"test": data["test"]}, tok, model, trained)
        print_table([report(model, data, examples, stage, trained, tok, machine)], trained)
        return 0
    question = data_prep.tokenize([dict(question=flags.ask, steps=[], answer="")], tok, model.config.block_size,
                                  2 + trained.stage_max * trained.c, "--ask")[0]
    rows, thoughts, _ = answer(model, [sequence_of(question, stage, trained, tok)], tok, trained, machine)
    for i, thought in enumerate(thoughts[0].float()):
        top = model.head(thought).softmax(-1).topk(5)
        print(f"thought {i + 1}  norm {thought.norm():6.2f}  " + "  ".join(
            f"{tok.decode([t])!r} {100 * p:.0f} %" for p, t in zip(top.values.tolist(), top.indices.tolist())))
    print(tok.decode(rows[0]))
    return 0


def run(flags, typed, bar=None):
    """One training run, from its start or where its folder left it. Returns what `train` returns."""
    flags, resumed = runtime.open_run(flags, typed, DEFAULTS, NOT_OF_A_RUN)
    if resumed and resumed["at"]["part"] == resumed["at"].get("parts"):
        return resumed["at"]["rows"]
    machine = runtime.Machine(flags.device, flags.dtype, flags.n_embd)
    flags.dtype = str(machine.dtype).removeprefix("torch.")          # resuming and evaluation must not choose again
    with machine.rank_0_first():
        data = data_prep.load(flags.data)
        torch.manual_seed(flags.seed)
        model, tok = from_checkpoint(resumed, flags.dropout) if resumed else start_model(flags, data)
        examples = tokenize(data, tok, model, flags)
    if flags.switch == "classifier" and model.switch is None:
        model.add_switch()
    model.to(machine.device)
    os.makedirs(flags.out, exist_ok=True)
    if bar is None:
        print(f"{machine}; {model.n_params() / 1e6:.2f} M parameters, vocabulary {tok.n_vocab:,}; "
              f"{len(data['train']):,} training items; writing to {flags.out}")
        print(" ".join(f"{k}={v}" for k, v in sorted(vars(flags).items()) if v is not None))
    return train(model, tok, data, examples, flags, machine, resumed, bar)


def table(flags, typed):
    """--table: every method for every seed, then table 1 of the paper, from the best checkpoints."""
    methods = typed["methods"].split(",") if "methods" in typed else list(METHODS)
    seeds = range(flags.seed, flags.seed + typed.get("seeds", 3))
    runs = [(m, s, os.path.join(flags.out, f"{m}-{s}")) for m in methods for s in seeds]
    machine = runtime.Machine(flags.device, flags.dtype, flags.n_embd)
    with machine.rank_0_first():
        data = data_prep.load(flags.data)
    updates = sum(n for _, n in stages(flags, -(-len(data["train"]) // flags.batch_size)))
    with runtime.progress_bar(updates * len(runs)) as bar:
        for i, (method, seed, out) in enumerate(runs):
            bar.set_description(f"{method}, seed {seed}")
            how = "resume" if os.path.exists(os.path.join(out, "last.pt")) and "overwrite" not in typed else "overwrite"
            one = argparse.Namespace(**vars(flags) | dict(method=method, seed=seed, out=out))
            own = {k: v for k, v in vars(one).items() if k != "dtype"}          # all must be alike, typed or not
            if run(one, own | {how: True}, bar) is None:
                return None
            bar.update(updates * (i + 1) - bar.n)               # what a resumed run had done before
    rows = []
    for method in methods:
        for thoughts in CONTROLS if method == "coconut" else CONTROLS[:1]:
            found = []
            for seed in seeds:
                model, tok, trained, machine = trained_model(os.path.join(flags.out, f"{method}-{seed}", "best.pt"),
                                                             dict(thoughts=thoughts))
                examples = tokenize({"test": data["test"]}, tok, model, trained)
                found.append(report(model, data, examples, last_stage(trained), trained, tok, machine))
            accuracy = [100 * r["accuracy"] for r in found]
            rows.append(dict(
                method=method, thoughts=thoughts, seeds=list(seeds), accuracy=accuracy, mean=np.mean(accuracy),
                std=np.std(accuracy, ddof=1) if len(seeds) > 1 else 0.0, n=found[0]["n"], updates=updates,
                tokens=np.mean([r["tokens"] for r in found]), seconds_batch_1=np.median([r["seconds_batch_1"] for r in found])))
    floors = {name: value for name, value in data_prep.stats(data["test"]).items() if name.startswith("floor")}
    lines = [f"{flags.data}, {rows[0]['n']:,} test questions, {updates:,} updates, seeds {', '.join(map(str, seeds))}", "",
             "| method | accuracy, % | tokens | ms per question, batch 1 |", "|---|---|---|---|"]
    for r in rows:
        name = r["method"] if r["thoughts"] == "keep" else f"{r['method']}, thoughts {r['thoughts']}"
        lines.append(f"| {name} | {r['mean']:.1f} ± {r['std']:.1f} | {r['tokens']:.1f} | {1000 * r['seconds_batch_1']:.1f} |")
    lines += [f"| {name.removesuffix(', %')} | {value:.1f} | | |" for name, value in floors.items()]
    print("\n".join(lines))
    if machine.rank == 0:
        with open(os.path.join(flags.out, "table.md"), "w") as f:
            f.write("\n".join(lines) + "\n")
        data_prep.write_json(os.path.join(flags.out, "table.json"), dict(data=flags.data, rows=rows, floors=floors))
    return rows


def main(argv=None):
    flags, typed = parse_flags(argv)
    if flags.method == "coconut" and flags.stage_max == 0:
        raise UserError("--stage-max 0 leaves no thought to train; use --method cot.")
    if (flags.epochs_last or flags.steps_last) == 0:
        raise UserError("--steps-last 0 leaves the last stage untrained; lower --stage-max instead.")
    if "eval_only" in typed:
        return evaluate_checkpoint(flags, typed)
    rows = table(flags, typed) if "table" in typed else run(flags, typed)
    if rows is None:
        print("stopped; " + ("the same command goes on" if "table" in typed else
                             f"continue with: python coconut.py --resume --out {flags.out}"))
        return 130
    if "table" not in typed:
        print_table(rows, flags)
    return 0


if __name__ == "__main__":
    runtime.run_main(main, data_prep.DataError)
