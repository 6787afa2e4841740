"""SIM-CoT: supervised implicit chain of thought (Wei et al. 2025, arXiv 2509.20317).

Coconut scores only the language after its thoughts. SIM-CoT adds a decoder, a second transformer
with the same token embeddings, that must write each removed step from the c thoughts in its place:

    question <bot> o  o  o <eot> answer                  L_language, as in Coconut
                   |  |  |
                   v  v  v     the decoder reads one     L_step: mean over the steps k of
             step 1   2  3     thought, writes a step            CE(step k | thought k)

    L = L_language + lambda L_step

Gradients flow through the decoder into the thoughts and all that led to them, so each thought
learns to hold its step. At test time the decoder is dropped; --explain asks it what thoughts hold.
A step that it writes correctly was in its thoughts, whether or not the model makes use of it.

Read on in this order: curriculum, read, step_loss, train, explain.
    python simcot.py
"""

import dataclasses
from typing import NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

import data_prep
from common import (evaluation, experiment, optim, reached, runtime, schedule, settings, staged,
                    weights)
from common.runtime import count, real
from common.text import Sequence, collate
from gpt2 import GrowingCache

ROWS = {"simcot": {}, "coconut": dict(step_weight=0.0)}      # of --table; the second is Coconut


# ---------------------------------------------------------------- the method

class Lesson(NamedTuple):
    """A text.Sequence, and the steps that its thoughts stand for."""
    prompt: list
    n_latent: int
    language: list
    steps: list        # for every c thoughts the tokens of their step and eos; [] of spare ones


def curriculum(example, stage, flags, tok, rng=None):
    """What one example looks like at one stage of Coconut's curriculum, a Lesson.

    The first `stage` steps are removed, and c thoughts stand for each. At stage_max + 1 all are,
    and those after stage_max join the last one. Where an example has fewer steps, nothing is asked
    of spare thoughts (the authors: what follows <eot>). rng: in training, for stage mixing.
    """
    question, steps, answer = example
    if flags.plain_stage_0 and stage == 0:               # CoT, without <bot> and <eot>
        return Lesson(question[:-1], 0, question[-1:] + sum(steps, []) + answer, [])
    if rng is not None:
        stage = schedule.mixed(stage, len(steps), flags, rng)
    n = min(stage, flags.stage_max)
    end = len(steps) if stage > n else stage             # the steps before it are removed
    held = []
    for i in range(n):
        removed = steps[i:end] if i == n - 1 else steps[i:i + 1]
        held.append(sum(removed, []) + [tok.eos] if removed else [])
    return Lesson(question + [tok.bot], n * flags.c, [tok.eot] + sum(steps[end:], []) + answer,
                  held)


def read(model, cache, batch, thoughts=None):
    """Coconut's pass over a Batch: the prompt; k thoughts, each the last state, fed back; language.
    thoughts (B, k, C): read these instead of thinking. Returns the states (B, T, C) that predict
    what follows each token of the language, and the thoughts."""
    x, keep = model.wte(batch.prompt), batch.keep
    if thoughts is None:
        thoughts = [x[:, :0]]
        for i in range(batch.latent.size(1)):
            h = model(embeds=x, cache=cache, keep=keep, last=1)         # (B, 1, C)
            thoughts.append(h)
            x, keep = h, batch.latent[:, i:i + 1]
        thoughts = torch.cat(thoughts, 1)
    else:
        x, keep = torch.cat([x, thoughts], 1), torch.cat([keep, batch.latent], 1)
    x = torch.cat([x, model.wte(batch.language).to(x.dtype)], 1)
    keep = torch.cat([keep, torch.ones_like(batch.language, dtype=torch.bool)], 1)
    return model(embeds=x, cache=cache, keep=keep, last=batch.language.size(1)), thoughts


def with_decoder(s, saved, where):
    """s with a decoder, if its run has one: a transformer of the model's shape, which begins with
    the model's weights (the authors': a second GPT-2) and shares its token embeddings, also as its
    head. saved: a checkpoint, from the file `where`, that has its weights; None: it is new."""
    if not s.flags.step_weight:
        return s
    layers = s.flags.decoder_layers or s.model.config.n_layer
    decoder = type(s.model)(dataclasses.replace(s.model.config, n_layer=layers, switch=False))
    decoder.load_state_dict(s.model.state_dict(), strict=False)     # of the layers that both have
    if saved:
        weights.load_into(decoder, saved.get("decoder", {}), where)
    decoder.wte = s.model.wte
    return s._replace(decoder=decoder.train(s.model.training))


def step_loss(decoder, thoughts, lessons, c, pad):
    """L_step of B Lessons and their thoughts (B, k, C), summed over the Lessons: of each the mean
    over its removed steps of the mean over their tokens (the authors: of the sum, so that their
    lambda counts more). The decoder reads each step as a row of its own, here c = 2:

        o o  s1 s2             the decoder sees no other thought and no question
          |  |  |
          v  v  v
          s1 s2 eos
    """
    held = [(row, i, ids) for row, q in enumerate(lessons) for i, ids in enumerate(q.steps) if ids]
    if not held:
        return torch.zeros((), device=thoughts.device)
    rows, which, steps = map(list, zip(*held))
    z = thoughts.unflatten(1, (-1, c))[rows, which]                     # (N, c, C)
    # the first token of a Sequence's language is given: here it is the last thought, not a token
    words = collate([Sequence([], 0, [pad] + ids) for ids in steps], pad, z.device)
    x = torch.cat([z, decoder.wte(words.language[:, 1:]).to(z.dtype)], 1)
    h = decoder(embeds=x, last=words.language.size(1))                  # (N, T, C)
    logits = decoder.head(h.flatten(0, 1)[words.where])                 # labels only
    losses = F.cross_entropy(logits.float(), words.labels, reduction="none")
    # each label counts 1 / (steps of its Lesson * tokens of its step), as both are means
    weight = []
    for row, ids in zip(rows, steps):
        weight += len(ids) * [1 / (rows.count(row) * len(ids))]
    return (losses * torch.tensor(weight, device=losses.device)).sum()


def simcot_loss(s, lessons, n_labels, n_lessons):
    """L and its two terms, of which Coconut, without decoder, has none. s: experiment.Setup.
    n_labels, n_lessons: how many the whole batch has, of which these are a part; losses add up."""
    batch = collate(lessons, s.tok.eos, s.machine.device)
    h, thoughts = read(s.model, GrowingCache(), batch)
    logits = s.model.head(h.flatten(0, 1)[batch.where])                 # (N, V), labels only
    language = F.cross_entropy(logits.float(), batch.labels) * (len(batch.labels) / n_labels)
    if s.decoder is None:
        return language, []
    step = step_loss(s.decoder, thoughts, lessons, s.flags.c, s.tok.eos) / n_lessons
    return language + s.flags.step_weight * step, [language, step]


# ---------------------------------------------------------------- training

def lengths(examples, stage, flags):
    """(n, 2): tokens of question and language at a stage; items alike in both share a batch."""
    question, steps, answer = examples.lengths                          # (n,), (n, most), (n,)
    left = steps[:, stage:] if stage <= flags.stage_max else steps[:, :0]
    return np.stack([question, left.sum(1) + answer], 1)


def train(s, examples, bar=None):
    """The curriculum, update by update. s: experiment.Setup; examples: {split: Examples}; bar: the
    progress bar of --table. Returns the rows of the result table, or None if stopped."""
    flags, machine, tok, training = s.flags, s.machine, s.tok, examples["train"]
    plan = schedule.stages(flags, -(-len(training) // flags.batch_size))
    course = staged.Course(s, examples, plan, lengths, sequences_of, think_and_answer, bar)
    optimizers = course.run.resume(optim.new_optimizers(flags, s.model, decoder=s.decoder))
    learned = list(nn.ModuleList(s.modules().values()).parameters())    # what they share: once

    for stage, updates in course.stages():
        if course.at["update"] == 0 and flags.reset_optimizer:
            optimizers = optim.new_optimizers(flags, s.model, decoder=s.decoder)
        for update in course.updates():
            # data: as Coconut's, and the steps that were removed
            chosen, rng = course.batch()
            lessons = [curriculum(training[i], stage, flags, tok, rng) for i in chosen]
            n_labels = sum(len(q.language) - 1 for q in lessons)

            # learning rate: each stage warms up and, with --lr-decay, ends at 0
            rate = optim.trapezoid(update, updates, flags.lr, flags.warmup, flags.lr_decay)
            optim.set_rate(optimizers, rate)

            # forward and backward: the whole batch's mean losses, to which its parts add up
            machine.seed(flags.seed, course.at["done"])
            losses = torch.zeros(1 if s.decoder is None else 3, device=machine.device)
            for part in schedule.alike(machine.share(lessons, flags.accumulate)):
                with machine.autocast():
                    loss, terms = simcot_loss(s, part, n_labels, len(lessons))
                loss.backward()
                losses += torch.stack([loss, *terms]).detach()
            loss, *terms = machine.sum_gradients(learned, losses)

            # step
            optim.step(optimizers, learned, flags.grad_clip)
            course.step(loss, lessons)

            # validation, where it is due: without the decoder
            course.validate(optimizers, dict(zip(("language", "step"), terms)))
            if course.pause(optimizers):
                return None

        # not learned: again; else a row of the table, the last one from the best checkpoint
        course.finish_stage(optimizers)
    return course.close()


# ---------------------------------------------------------------- decoding and evaluation

@torch.no_grad()
def think_and_answer(s, sequences, thoughts=None):
    """Think, or read thoughts (B, k, C) instead, and decode greedily, without the decoder. Returns
    token-id lists, in order, thoughts (B, k, C) and latent (B, k): which thoughts a row has."""
    batch = evaluation.given(s, sequences)
    with s.machine.autocast():
        cache = evaluation.new_cache(s, batch)
        h, thoughts = read(s.model, cache, batch, thoughts)
        said = s.model.decode(cache, h[:, -1], evaluation.limit(s), s.tok.eos)
    return said, thoughts, batch.latent


def sequences_of(examples, stage, s):
    """The Lessons of some Examples at a stage, as they are tested."""
    return [curriculum(e, stage, s.flags, s.tok) for e in examples]


def explain(s, thoughts):
    """What the decoder writes of thoughts (n, k, C): for each of n the k / c texts."""
    z = thoughts.unflatten(1, (-1, s.flags.c))                          # (n, k / c, c, C)
    texts = evaluation.written(s, s.decoder, z.flatten(0, 1))
    return [texts[i:i + z.size(1)] for i in range(0, len(texts), z.size(1))]


# ---------------------------------------------------------------- settings

RECIPES = {"chains-mixed": dict(data="chains-mixed"), "prosqa-mini": schedule.PROSQA_MINI,
           "gsm8k": schedule.GSM8K}
SETTINGS = settings.together({
    settings.MOST: [
        ("method", "simcot", ("simcot",), "the only one; with --step-weight 0 it is Coconut"),
        ("stage_max", 3, count(1, 1000), "last stage: how many reasoning steps become thoughts"),
        ("c", 1, count(1), "continuous thoughts per replaced step"),
        ("step_weight", 1.0, real(), "lambda, the weight of L_step (0: no decoder, Coconut)"),
        ("decoder_layers", None, count(1, 1000), "layers of the decoder (default: the model's)")],
    **schedule.SETTINGS,
    "evaluation and files": [
        ("explain", None, settings.SWITCH, "--eval-only: how often the decoder writes the steps "
                                           "from their thoughts; with --ask: what it writes"),
        ("rows", None, str, "--table: which rows, with commas (default: simcot,coconut)")],
}, RECIPES)
DEFAULTS = settings.defaults(SETTINGS, **schedule.CHAINS_MIXED)      # those of coconut.py


def parse_flags(argv=None):
    """The settings of a run, as a Namespace, and those that were typed, as a dict."""
    flags, typed, _ = settings.parse(argv, "simcot.py", __doc__, SETTINGS, DEFAULTS, RECIPES,
                                     ("rows", ROWS, ROWS), schedule.EITHER)
    flags.out = settings.out_folder(flags, f"simcot-{'table' if flags.table else flags.seed}")
    return flags, typed


# ---------------------------------------------------------------- main

examples_of = staged.examples_of


def run(flags, typed, bar=None):
    """One training run, from its start or where its folder left it. Returns what train returns."""
    return staged.run(flags, typed, bar, SETTINGS, DEFAULTS, data_prep.load, with_decoder, train)


def trained_model(path, changed):
    """The Setup of a checkpoint of this script, and the stage that it is at."""
    s = experiment.open_checkpoint(path, SETTINGS, DEFAULTS, changed)
    s = experiment.place(with_decoder(s, s.state, path))
    return s, schedule.stage_of(s.state["at"], schedule.stages(s.flags, 10**6), path)


def evaluate_checkpoint(flags, changed):
    """--eval-only: the last line of the table, or what --explain, --thoughts or --ask asks for."""
    s, stage = trained_model(flags.eval_only, changed)
    staged.evaluate(s, stage, flags, changed, data_prep.load, sequences_of, think_and_answer,
                    explain if flags.explain else None)


def train_table(flags):
    """--table: with and without decoder, for every seed, and how soon each stage is learned."""
    return staged.train_table("simcot.py", flags, {name: ROWS[name] for name in flags.rows},
                              schedule.stages, data_prep, run, trained_model, sequences_of,
                              think_and_answer, reached.lines)


def main(argv=None):
    flags, typed = parse_flags(argv)
    return experiment.main("simcot.py", flags, typed, run, schedule.print_stages,
                           evaluate_checkpoint, train_table, also=("explain",))


if __name__ == "__main__":
    runtime.run_main(main)
