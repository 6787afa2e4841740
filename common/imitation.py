"""A start for methods that need a model that thinks in words: it imitates the steps of the data.

This is plain CoT training, without which there would be nothing to reinforce. It belongs to no
method: the loop of a method begins where this one ends.
"""

import argparse

import numpy as np
import torch.nn.functional as F

from common import evaluation, optim, runtime
from common.text import Sequence, batches, collate
from gpt2 import GrowingCache

RECIPE = dict(optimizer="muon", lr=2e-3, weight_decay=0.1, momentum=0.95, beta2=0.95)
BATCH, WARMUP, DECAY, CLIP = 32, 20, 0.2, 1.0


def in_words(example):
    """The Sequence of an Example: its steps and its answer follow the question."""
    return Sequence(example.question[:-1], 0,
                    example.question[-1:] + sum(example.steps, []) + example.answer)


def loss_in_words(model, batch):
    """Mean cross-entropy of what follows the question, over the label tokens of a Batch."""
    cache = GrowingCache()
    if batch.prompt.size(1):
        model(batch.prompt, cache=cache, keep=batch.keep, last=1)
    h = model(batch.language, cache=cache)
    logits = model.head(h.flatten(0, 1)[batch.where])                   # (N, V), labels only
    return F.cross_entropy(logits.float(), batch.labels)


def greedy_in_words(s, sequences):
    """Steps and answers by greedy decoding, as evaluation.evaluate takes them: no thoughts."""
    model, batch = s.model, evaluation.given(s, sequences)
    with s.machine.autocast():
        cache = evaluation.new_cache(s, batch)
        if batch.prompt.size(1):
            model(batch.prompt, cache=cache, keep=batch.keep, last=1)
        h = model(batch.language, cache=cache)[:, -1]
        said = model.decode(cache, h, evaluation.limit(s), s.tok.eos)
    return said, h[:, None][:, :0], batch.latent


def learn(s, run, examples, updates):
    """Imitate the Examples, up to `updates` updates of a Run in all. s: experiment.Setup. Returns
    False if stopped."""
    flags, machine, model, at = s.flags, s.machine, s.model, run.at
    if at["done"] >= updates:
        return True
    recipe = argparse.Namespace(**vars(flags) | RECIPE)
    optimizers = run.resume(optim.new_optimizers(recipe, model))
    question, steps, answer = examples.lengths
    lengths = np.stack([question, steps.sum(1) + answer], 1)
    n_batches, order = -(-len(examples) // BATCH), None
    while at["done"] < updates:
        epoch, k = divmod(at["done"], n_batches)
        if order is None or k == 0:
            order = batches(lengths, BATCH, runtime.generator(flags.seed, 0, epoch))
        sequences = [in_words(examples[i]) for i in order[k]]
        n_labels = sum(len(q.language) - 1 for q in sequences)
        optim.set_rate(optimizers, optim.trapezoid(at["done"], updates, recipe.lr, WARMUP, DECAY))
        machine.seed(flags.seed, at["done"])
        loss = 0.0
        for part in machine.share(sequences, flags.accumulate):
            batch = collate(part, s.tok.eos, machine.device)
            with machine.autocast():
                part_loss = loss_in_words(model, batch) * (len(batch.labels) / n_labels)
            part_loss.backward()
            loss += part_loss.detach()
        loss = machine.sum_gradients(model.parameters(), loss)
        optim.step(optimizers, model.parameters(), CLIP)
        end = at["done"] + 1 == updates
        run.step(loss, sequences, end, phase="imitation")
        if run.pause(optimizers, flags.save_every, end):
            return False
    return True
