"""A lab for Soft Thinking: a model, the questions it is asked, and how its thinking ends.

There are two kinds of model. One that was trained here knows the format of its data: lines of
steps, and an answer prompt. One that follows instructions is `free`: it is asked in a chat, thinks
in its own words, and its answer is the last number that it writes.
"""

import argparse
import os
import time
from typing import NamedTuple

import torch
from tqdm import tqdm

from common import runtime, text
from common.rollouts import Draft, FreeDraft, limits, prompt_tokens
from common.runtime import UserError
from common.scoring import number_of

# What the settings are where nothing is typed. A language model takes seconds for what a small one
# does in milliseconds, and it is less certain.
TRAINED = dict(n=200, draws=32, batch_size=256, uncertain=0.1)
FREE = dict(n=24, draws=2, batch_size=96, uncertain=0.5, forks=64, max_think=160, max_new=24)
PUT_IN = "\nThe answer is"       # where the thinking of a free model is ended


def either(name):
    """What --help says of the default of a setting that depends on the model."""
    return f"(default {TRAINED[name]}; {FREE[name]} for a language model)"


class Lab(NamedTuple):
    """What thinks, and about what."""
    flags: argparse.Namespace
    machine: runtime.Machine
    model: torch.nn.Module
    tok: text.Tokenizer
    items: list
    questions: list          # token ids of each
    prompt: str              # what an answer begins with: "### "
    usual: list              # the tokens of it that most answers have: put in to end a thinking
    columns: int             # of every cache: one size, so that a compiled step is compiled once
    draft: type = Draft      # how thinking ends

    @property
    def free(self):
        """Is this a model that follows instructions?"""
        return self.draft is FreeDraft


# ---------------------------------------------------------------- opening


def folder(flags, data):
    """--out, or the folder of the results of a run by its data, and of a language model's by its
    name."""
    names = [os.path.basename(os.path.normpath(data)), str(flags.seed)]
    if flags.model and not os.path.isfile(flags.model):
        names.insert(0, os.path.basename(os.path.normpath(flags.model)))
    return flags.out or os.path.join("out", "-".join(["soft", *names]))


def open_lab(s, flags, load):
    """The Lab of a Setup, whose model is trained, and of the flags typed. load: data_prep.load.
    Raises UserError if questions and model do not fit."""
    free = s.tok.template is not None or flags.prompt_template is not None
    data, items = questions_of(s, flags, load, free)
    usual = FREE if free else TRAINED
    chosen = {name: value for name, value in usual.items() if getattr(flags, name) is None}
    flags = argparse.Namespace(**vars(flags) | chosen | dict(data=data, out=folder(flags, data)))
    lab = (ask_freely if free else ask_as_trained)(s, flags, items[:flags.n])
    columns = max(map(len, lab.questions)) + lab.flags.max_think
    columns += max(lab.flags.max_new, lab.flags.lag)
    if columns > s.model.config.block_size:
        raise UserError(f"the longest question, --max-think {lab.flags.max_think} and --max-new "
                        f"{lab.flags.max_new} take {columns} positions, the model has "
                        f"{s.model.config.block_size}; lower one of the two.")
    s.model.to(s.machine.device)
    if s.machine.dtype == torch.bfloat16:
        s.model.head = in_float32(s.model.head)
    if flags.compile or (flags.compile is None and s.machine.device.type == "cuda"):
        s.model.compiled()
    return lab._replace(columns=columns)


def in_float32(head):
    """The head of a model, computed in float32: bfloat16 has eight bits, in which the logits of two
    likely tokens are often equal."""
    def logits(h):
        with torch.autocast(h.device.type, enabled=False):
            return head(h.float())
    return logits


def questions_of(s, flags, load, free):
    """(name, items): the question of --prompt, or the test split of a data set."""
    if flags.prompt is not None:
        return "prompt", [dict(question=flags.prompt, steps=[], answer="")]
    data = flags.data or (getattr(s.flags, "data", None) if s.state else None)
    if data is None:
        data = "prosqa-mini"
        if free:
            data = "multiarith"
            if not os.path.isdir(os.path.join("data", data)):
                print("multiarith is not there (get it with 'python data_prep.py multiarith'): "
                      "asking the questions of chains")
                data = "chains"
    items = load(data, need=("test",))["test"]
    if free and number_of(items[0]["answer"]) is None:
        print(f"the answers of {data} are not numbers, so none is counted as right")
    return data, items


def ask_as_trained(s, flags, items):
    """The Lab of a model that was trained here, or of GPT-2: all but columns."""
    prompt = getattr(s.flags, "prompt", None) if s.state else None
    prompt = prompt or text.COCONUT_MARK
    examples = text.tokenize(items, s.tok, 10 ** 9, 0, f"{flags.data}, test.json", prompt)
    questions = [example.question for example in examples]
    usual = prompt_tokens([example.answer for example in examples], s.tok, prompt)
    flags = limits(flags, examples, s.tok, prompt, usual)
    return Lab(flags, s.machine, s.model, s.tok, items, questions, prompt, usual, 0)


def ask_freely(s, flags, items):
    """The Lab of a model that follows instructions: all but columns."""
    questions = [s.tok.chat(item["question"], flags.prompt_template) for item in items]
    usual = s.tok.encode(PUT_IN)
    return Lab(flags, s.machine, s.model, s.tok, items, questions, PUT_IN, usual, 0, FreeDraft)


# ---------------------------------------------------------------- progress


class Progress(tqdm):
    """A progress bar over the steps of batches, with tokens per second and the time left. A batch
    takes at most `most` steps; those that are left when it ends are skipped."""

    def __init__(self, what, batches, most):
        self.tokens, self.most, self.begun = 0, most, time.perf_counter()
        super().__init__(total=batches * most, desc=what, unit="step", ncols=100, leave=False,
                         smoothing=0, delay=1, disable=None)

    def step(self, drafts):
        """One step of a batch was made."""
        self.tokens += sum(not draft.done for draft in drafts)
        rate = self.tokens / (time.perf_counter() - self.begun)
        self.set_postfix_str(f"{rate:,.0f} tokens/s", refresh=False)
        self.update()

    def next_batch(self):
        self.update(-self.n % self.most)
