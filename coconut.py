"""Coconut: Chain of Continuous Thought (Hao et al. 2024, arXiv 2412.06769).

A language model that reasons in words feeds its last token back; Coconut feeds back the last hidden
state, h = ln_f(...) at the last position, as the next input embedding. Between <bot> and <eot>:

    E = [e(x1) .. e(xT), e(<bot>), h_T+1, h_T+2, .. h_T+k, e(<eot>), e(language) ..]   (section 3.1)

A curriculum moves the reasoning over: at stage s the first s reasoning steps are replaced by s * c
continuous thoughts, and the loss counts only the language that remains (figure 2, section 3.2):

    stage 0   question <bot> <eot> step 1  step 2  step 3  answer
    stage 1   question <bot> o <eot>       step 2  step 3  answer        o: c thoughts
    stage 3   question <bot> o o o <eot>                   answer

Read on in this order: curriculum, think, read_on, coconut_loss, train, think_and_answer.
    python coconut.py --stage-max 3 --c 1
"""

import numpy as np
import torch
import torch.nn.functional as F

import data_prep
from common import (evaluation, experiment, optim, runtime, schedule, scoring, settings,
                    staged)
from common.runtime import count, real
from common.text import Sequence, collate
from gpt2 import GrowingCache

METHODS = {                          # name -> what replaces reasoning in words (table 1)
    "coconut": "continuous thoughts, by the curriculum",
    "cot": "nothing: all steps in words",
    "no-cot": "nothing: the answer at once",
    "icot": "language tokens are removed from the front, some at a time (Deng et al. 2024)",
    "pause": "as many learned <pause> tokens, without curriculum",
    "pause-as-thought": "<pause> tokens, by the curriculum",
    "no-thought": "the curriculum alone",
    "no-curriculum": "thoughts, trained at the last stage only",
}
ONE_STAGE = ("cot", "no-cot", "pause", "no-curriculum")
FEEDS_BACK = ("coconut", "no-curriculum")                   # methods whose thoughts are states


# ---------------------------------------------------------------- the method

def curriculum(example, stage, c, stage_max, method, tok, plain_stage_0=False):
    """What one example looks like at one stage (figure 2): a Sequence.

    Stage 0 keeps every step, stage s has the first s steps replaced by s * c thoughts (or <pause>
    tokens, or nothing), stage_max + 1 drops all steps, with thoughts still stage_max * c (the
    paper's extra stage). For icot, stage is the number of language tokens removed from the front.
    An example with fewer steps than `stage` gets as many thoughts as others: their number must not
    tell how long the solution is. plain_stage_0: stage 0 is CoT, without <bot> and <eot>.
    """
    question, steps, answer = example
    if method == "cot":
        words = sum(steps, [])
    elif method == "icot":
        words = sum(steps, [])[stage:]
    elif method in ("no-cot", "pause") or stage > stage_max:
        words = []
    else:
        words = sum(steps[stage:], [])
    plain = plain_stage_0 and stage == 0 and method not in ONE_STAGE
    if plain or method in ("cot", "no-cot", "icot", "no-thought"):
        return Sequence(question[:-1], 0, question[-1:] + words + answer)
    n = (stage_max if method == "pause" else min(stage, stage_max)) * c
    if method in ("pause", "pause-as-thought"):          # tokens like others: all in one pass
        return Sequence(question + [tok.bot] + n * [tok.pause], 0, [tok.eot] + words + answer)
    return Sequence(question + [tok.bot], n, [tok.eot] + words + answer)


def think(model, cache, prompt, keep, latent, switch=None):
    """Read the prompt, then feed the last hidden state back as the next input, k times.

    prompt (B, T) token ids, left-padded; keep (B, T) bool, real positions; latent (B, k) bool, the
    thoughts that each row has; further ones are padding. switch: a classifier that ends a row's
    thoughts early; `latent` is changed to what the row then had.
    Returns x (B, t, C) and keep (B, t), what is still to be read (the last thought, or the whole
    prompt if there are none), and the thoughts (B, k, C). So k thoughts cost k passes here and one
    in read_on: the paper's n + 1.
    """
    x, thoughts = model.wte(prompt), []
    for i in range(latent.size(1)):
        h = model(embeds=x, cache=cache, keep=keep, last=1)             # (B, 1, C)
        thoughts.append(h)
        x, keep = h, latent[:, i:i + 1]
        if switch is not None:
            latent[:, i + 1:] &= switch(h[:, 0]) < 0
            if not latent[:, i + 1:].any():
                break
    return x, keep, torch.cat(thoughts, 1) if thoughts else x[:, :0]


def read_on(model, cache, x, keep, language):
    """Read what think left over, then language (B, T). Returns the states (B, T, C) that predict
    what follows each token of it."""
    x = torch.cat([x, model.wte(language).to(x.dtype)], 1)
    keep = torch.cat([keep, torch.ones_like(language, dtype=torch.bool)], 1)
    return model(embeds=x, cache=cache, keep=keep, last=language.size(1))


def coconut_loss(model, batch):
    """Mean cross-entropy over the batch's label tokens, and the thoughts (B, k, C).
    Gradients flow through every thought and through the cached keys and values to the question.
    Labels are the language after its first token; question, <bot>, thoughts, <eot> have none.
    """
    cache = GrowingCache()
    x, keep, thoughts = think(model, cache, batch.prompt, batch.keep, batch.latent)
    h = read_on(model, cache, x, keep, batch.language)
    logits = model.head(h.flatten(0, 1)[batch.where])                   # (N, V), labels only
    return F.cross_entropy(logits.float(), batch.labels), thoughts


def switch_loss(switch, thoughts, latent):
    """Mean binary cross-entropy of --switch classifier over the real thoughts: is this the last one
    of its row? thoughts (B, k, C); latent (B, k) bool, which of them a row has."""
    last = latent & ~F.pad(latent[:, 1:], (0, 1))
    scores = switch(thoughts)[latent][:, 0]
    return F.binary_cross_entropy_with_logits(scores.float(), last[latent].float())


# ---------------------------------------------------------------- training

def stages(flags, n_batches, longest=0):
    """The list of (stage, updates). A baseline without stages gets as many updates in all; icot
    removes its tokens, `longest` of them, over the updates of the stages between."""
    plan = schedule.stages(flags, n_batches)
    if flags.method in ONE_STAGE:
        return schedule.at_once(plan, plan[-1][0] if flags.method == "no-curriculum" else 0)
    if flags.method == "icot":
        return schedule.by_tokens(plan, flags.icot_tokens, longest)
    return plan


def training_sequence(example, stage, flags, tok, rng):
    """curriculum, with what only training has: stage mixing, icot's random extra removal, and for
    --switch classifier at most c thoughts for each step that the example has. A plain stage 0 is
    not mixed; a stage 0 that is drawn for an item of a later stage has <bot> and <eot>."""
    plain = flags.plain_stage_0 and stage == 0
    if flags.method == "icot":
        stage += int(rng.exponential(1 / flags.icot_smoothing)) if flags.icot_smoothing else 0
    elif flags.method not in ONE_STAGE and not plain:
        stage = schedule.mixed(stage, len(example.steps), flags, rng)
    sequence = curriculum(example, stage, flags.c, flags.stage_max, flags.method, tok, plain)
    if flags.switch == "classifier":
        most = max(1, len(example.steps)) * flags.c
        sequence = sequence._replace(n_latent=min(sequence.n_latent, most))
    return sequence


def lengths(examples, stage, flags):
    """(n, 2): the tokens of question and language that curriculum leaves of each of the Examples,
    without <bot>, <eot> and the like. Items alike in both share a batch."""
    question, steps, answer = examples.lengths                          # (n,), (n, most), (n,)
    if flags.method == "cot":
        words = steps.sum(1)
    elif flags.method == "icot":
        words = (steps.sum(1) - stage).clip(0)
    elif flags.method in ("no-cot", "pause") or stage > flags.stage_max:
        words = 0
    else:
        words = steps[:, stage:].sum(1)
    return np.stack([question, words + answer], 1)


def train(s, examples, bar=None):
    """The curriculum, update by update. s: experiment.Setup; examples: {split: Examples}; bar: the
    progress bar of --table. Returns the rows of the result table, or None if stopped."""
    flags, machine, model, tok, training = s.flags, s.machine, s.model, s.tok, examples["train"]
    n_batches = -(-len(training) // flags.batch_size)
    plan = stages(flags, n_batches, int(training.lengths.steps.sum(1).max()))
    course = staged.Course(s, examples, plan, lengths, sequences_of, think_and_answer, bar)
    optimizers = course.run.resume(optim.new_optimizers(flags, model))

    for stage, updates in course.stages():
        if course.at["update"] == 0 and (flags.reset_optimizer or flags.method == "icot"):
            optimizers = optim.new_optimizers(flags, model)
        for update in course.updates():
            # data: its order is a function of seed, stage and epoch, so resuming needs no replay
            chosen, rng = course.batch()
            sequences = [training_sequence(training[i], stage, flags, tok, rng) for i in chosen]
            n_labels = sum(len(q.language) - 1 for q in sequences)
            n_thoughts = sum(q.n_latent for q in sequences)

            # learning rate: each stage warms up and, with --lr-decay, ends at 0
            optim.set_rate(optimizers, optim.trapezoid(update, updates, flags.lr, flags.warmup,
                                                       flags.lr_decay))

            # forward and backward: the whole batch's mean loss, to which its parts add up
            machine.seed(flags.seed, course.at["done"])
            loss = torch.zeros((), device=machine.device)
            for part in schedule.alike(machine.share(sequences, flags.accumulate)):
                batch = collate(part, tok.eos, machine.device)
                with machine.autocast():
                    part_loss, thoughts = coconut_loss(model, batch)
                    part_loss = part_loss * (len(batch.labels) / n_labels)
                    if flags.switch == "classifier" and thoughts.size(1):
                        ends = switch_loss(model.switch, thoughts, batch.latent)
                        part_loss = part_loss + ends * (batch.latent.sum() / n_thoughts)
                part_loss.backward()
                loss += part_loss.detach()
            loss = machine.sum_gradients(model.parameters(), loss)

            # step
            optim.step(optimizers, model.parameters(), flags.grad_clip)
            course.step(loss, sequences)

            # validation, where it is due: the best model of the last stage is kept
            course.validate(optimizers)
            if course.pause(optimizers):
                return None

        # not learned: again; else a row of the table, the last one from the best checkpoint
        course.finish_stage(optimizers)
    return course.close()


# ---------------------------------------------------------------- decoding and evaluation

@torch.no_grad()
def think_and_answer(s, sequences, thoughts=None):
    """Think and decode greedily. s: experiment.Setup. thoughts (B, k, C): read these instead of
    thinking, of each row as many as its Sequence has. Returns token-id lists, in order, thoughts
    (B, k, C) and latent (B, k), the thoughts that each row has."""
    model, batch = s.model, evaluation.given(s, sequences)
    with s.machine.autocast():
        cache = evaluation.new_cache(s, batch)
        if thoughts is None:
            x, keep, thoughts = think(model, cache, batch.prompt, batch.keep, batch.latent,
                                      model.switch)
        else:
            x = torch.cat([model.wte(batch.prompt), thoughts], 1)
            keep = torch.cat([batch.keep, batch.latent], 1)
        h = read_on(model, cache, x, keep, batch.language)[:, -1]
        edit = scoring.Calculator(s.tok, len(sequences)) if s.flags.calculator else None
        said = model.decode(cache, h, evaluation.limit(s), s.tok.eos, edit)
    return said, thoughts, batch.latent[:, :thoughts.size(1)]


def sequences_of(examples, stage, s):
    """The Sequences of some Examples at a stage."""
    f = s.flags
    return [curriculum(e, stage, f.c, f.stage_max, f.method, s.tok, f.plain_stage_0)
            for e in examples]


# ---------------------------------------------------------------- settings

PAPER = schedule.PAPER | dict(icot_tokens=8)
LOGIC = PAPER | dict(stage_max=6, c=1, epochs_stage_0=5, epochs_per_stage=5, epochs_last=20)
RECIPES = {
    "chains-mixed": dict(data="chains-mixed"),
    "prosqa-mini": schedule.PROSQA_MINI,
    "prosqa": LOGIC | dict(data="prosqa"),
    "prontoqa": LOGIC | dict(data="prontoqa"),
    "gsm8k": PAPER | schedule.GSM8K,
}
SETTINGS = settings.together({
    settings.MOST: [
        ("method", "coconut", METHODS, "what replaces steps in words"),
        ("stage_max", 3, count(0, 1000), "last stage: how many reasoning steps become thoughts"),
        ("c", 1, count(1), "continuous thoughts per replaced step")],
    "method": [
        ("switch", "fixed", ("fixed", "classifier"), "what ends thinking: the number of thoughts, "
         "or earlier a linear head on the thought, trained too (section 3.1)"),
        ("icot_tokens", 4, count(1), "language tokens that icot removes at a time"),
        ("icot_smoothing", 4.0, real(), "icot removes o more with p ~ exp(-this * o) (0: none)")],
    **schedule.SETTINGS,
    "evaluation and files": [
        ("calculator", False, bool, "decoding: compute what is between << and ="),
        ("methods", None, str, "--table: the methods, with commas (default: all)")],
}, RECIPES)
DEFAULTS = settings.defaults(SETTINGS, **schedule.CHAINS_MIXED)      # minutes on two CPU cores


def parse_flags(argv=None):
    """The settings of a run, as a Namespace, and those that were typed, as a dict."""
    flags, typed, error = settings.parse(argv, "coconut.py", __doc__, SETTINGS, DEFAULTS, RECIPES,
                                         ("methods", METHODS, METHODS), schedule.EITHER)
    name = "table" if flags.table else f"{flags.method}-{flags.seed}"
    flags.out = settings.out_folder(flags, name)
    if flags.switch == "classifier" and flags.method not in FEEDS_BACK:
        error(f"--switch classifier is not for --method {flags.method}, which has no thoughts")
    if flags.method == "coconut" and flags.stage_max == 0:
        error("--stage-max 0 leaves no thought to train: use --method cot")
    return flags, typed


# ---------------------------------------------------------------- main

examples_of = staged.examples_of


def with_switch(s, saved, where):
    """s, with the classifier of --switch in its model; a resumed one has it. See staged.ready."""
    if s.flags.switch == "classifier" and s.model.switch is None:
        s.model.add_switch()
    return s


def run(flags, typed, bar=None):
    """One training run, from its start or where its folder left it. Returns what train returns."""
    return staged.run(flags, typed, bar, SETTINGS, DEFAULTS, data_prep.load, with_switch, train)


def trained_model(path, changed):
    """The Setup of a checkpoint of this script, and the stage that it is at. icot counts stages in
    removed tokens: where its run is over it is block_size, so none is left."""
    s = experiment.open_checkpoint(path, SETTINGS, DEFAULTS, changed)
    plan = stages(s.flags, 10**6, s.flags.block_size)
    return experiment.place(s), schedule.stage_of(s.state["at"], plan, path)


def evaluate_checkpoint(flags, changed):
    """--eval-only: the last line of the table, or what --thoughts or --ask asks for."""
    s, stage = trained_model(flags.eval_only, changed)
    staged.evaluate(s, stage, flags, changed, data_prep.load, sequences_of, think_and_answer)


def train_table(flags):
    """--table: every method for every seed; table 1 of the paper, from the best checkpoints."""
    variants = {method: dict(method=method) for method in flags.methods}
    return staged.train_table("coconut.py", flags, variants, stages, data_prep, run, trained_model,
                              sequences_of, think_and_answer)


def main(argv=None):
    flags, typed = parse_flags(argv)
    return experiment.main("coconut.py", flags, typed, run, schedule.print_stages,
                           evaluate_checkpoint, train_table, also=("calculator",))


if __name__ == "__main__":
    runtime.run_main(main)
