"""Rollouts: one thought, and the answer that was decoded after it, said token by token.

Thinking ends in one of two ways. A model that was trained here begins a line with its answer prompt
(Draft). A model that follows instructions writes as it likes, and its answer is the last number
(FreeDraft).

Nothing here knows of a model: a Rollout is token ids.
"""

import argparse
import re
from collections import Counter
from typing import NamedTuple

from common.scoring import extract_answer, last_number


class Rollout(NamedTuple):
    """One thought, and the answer that was decoded after it."""
    trace: list              # top-1 tokens of the thinking
    answer: list             # token ids from the answer prompt on, without eos
    ended: bool              # the thinking came to the prompt by itself
    cut: bool = False        # a limit ended the thinking or the answer


# ---------------------------------------------------------------- where thinking ends


def begins(line, prompt):
    """Does a line of text begin with the whole answer prompt? Blanks at the prompt's end may still
    be to come: tokenizers join them to the word that follows."""
    return (line + prompt[len(prompt.rstrip()):]).startswith(prompt)


class Draft:
    """A Rollout in the making: what one row has said so far, token by token.

        q  q  s1  s2  \n  ###  Step  1  \n  s3  s4  \n  ###  7  eos          s: thoughts
              thinking    perhaps answer     thinking    answer

    The answer begins where the whole answer prompt begins a line. Thoughts that spell a beginning
    of the prompt are thoughts like others until it is complete; then they belong to the answer. If
    the line with the prompt is not the last one, it was a step, and thinking goes on.
    """

    def __init__(self, lab, said=()):
        """lab: has tok, prompt (text), usual (its tokens, put in where thinking is ended) and the
        flags max_think and max_new. said: tokens that the row has said before."""
        self.tok, self.prompt, self.usual = lab.tok, lab.prompt, lab.usual
        self.max_think, self.max_new = lab.flags.max_think, lab.flags.max_new
        self.said = []           # token ids
        self.line = 0            # where in them the current line begins
        self.answer = None       # where in them the answer begins
        self.due = []            # tokens of a prompt put in that are still to come
        self.thinking, self.done, self.ended, self.cut = True, False, True, False
        for token in said:
            self.say(token)

    def say(self, token):
        """The row goes on with a token: the answer may begin, or turn out to be a step."""
        self.said.append(token)
        line = self.tok.decode(self.said[self.line:])
        if "\n" in line:
            self.line = len(self.said)
            if self.ended and self.line < self.max_think:
                self.thinking = True
        elif self.thinking and begins(line, self.prompt):
            self.thinking, self.answer = False, self.line
        if not self.thinking and self.n_answer() >= self.max_new:
            self.done = self.cut = True

    def go_on(self, thought, word, stop=False):
        """The row goes on with `thought` while it thinks, with `word` while it answers. stop: the
        thinking ends here, as it does at max_think steps and at eos. Then the prompt is put in,
        except that at eos a line that began with it is the answer."""
        token, eos = thought if self.thinking else word, self.tok.eos
        full = len(self.said) >= self.max_think
        if self.thinking and (full or stop or thought == eos):
            self.thinking = False
            if full or stop or self.answer is None:
                self.answer, self.due = len(self.said), list(self.usual)
                self.ended, self.cut = False, full
        if self.due:
            token = self.due.pop(0)
        if self.done or token == eos:
            self.done = True
        else:
            self.say(token)

    def n_answer(self):
        """How many tokens of an answer the row has said."""
        return 0 if self.thinking else len(self.said) - self.answer

    def rollout(self):
        """What was said, as a Rollout."""
        return Rollout(self.said[:self.answer], self.said[self.answer:], self.ended, self.cut)

    @staticmethod
    def value(tok, rollout):
        """The answer that a Rollout gives, as text; "" if there is none."""
        return extract_answer(tok.decode(rollout.answer))


PHRASE = re.compile(r"\bthe (final )?answer is\b", re.I)      # "Therefore, the final answer is"
SAID_ANSWER = re.compile(r"\d[^\n]*\n")                      # a line with a number, and its end


class FreeDraft(Draft):
    """A Rollout in the making of a model that follows instructions and has no answer prompt.

        .. 4 apples .  The answer is  9 .  \n          .. that makes 9 apples .  eos
        thinking       answer                          thinking

    The answer begins where the text says that it follows (PHRASE), and ends with the line that has
    its number. At eos the thinking ends without more. Only where it is ended, at max_think steps or
    by Cold Stop, is the prompt put in.
    """

    def say(self, token):
        self.said.append(token)
        if self.thinking:
            if PHRASE.search(self.tok.decode(self.said[-32:])):
                self.thinking, self.answer = False, self.phrase_start()
        elif SAID_ANSWER.search(self.tok.decode(self.said[self.answer:])):
            self.done = True
        if not self.thinking and not self.done and self.n_answer() >= self.max_new:
            self.done = self.cut = True

    def phrase_start(self):
        """Where in what was said the phrase at its end begins."""
        start = len(self.said) - 1
        while not PHRASE.search(self.tok.decode(self.said[start:])):
            start -= 1
        return start

    def go_on(self, thought, word, stop=False):
        stop = stop or len(self.said) >= self.max_think
        if self.thinking and thought == self.tok.eos and self.said and not stop:
            self.thinking, self.done, self.answer = False, True, len(self.said)
        else:
            super().go_on(thought, word, stop)

    @staticmethod
    def value(tok, rollout):
        return last_number(tok.decode(rollout.trace + rollout.answer))


# ---------------------------------------------------------------- the prompt, the limits


def prompt_tokens(answers, tok, prompt):
    """The tokens of the prompt in most of the answers (token ids), up to that which completes it:
    before a number, say, they are others than before a word."""
    found = Counter()
    for ids in answers:
        n = next(n for n in range(1, len(ids)) if begins(tok.decode(ids[:n]), prompt))
        found[tuple(ids[:n])] += 1
    return list(found.most_common(1)[0][0])


MAX_THINK, MAX_NEW = 40, 24      # where no gold text is longer


def limits(flags, examples, tok, prompt, usual):
    """flags with a --max-think and a --max-new that cut off no gold text of the Examples; lower
    ones that were typed stay, with a warning. Thinking needs room for the steps and for the prompt
    that ends it; --max-new is also for steps that begin with the prompt."""
    lines = [e.answer for e in examples]
    for example in examples:
        lines += [step for step in example.steps if begins(tok.decode(step), prompt)]
    think = max(sum(map(len, e.steps)) for e in examples) + len(usual)
    chosen = {}
    for name, usually, longest, what in (("max_think", MAX_THINK, think, "thinking"),
                                         ("max_new", MAX_NEW, max(map(len, lines)), "answers")):
        typed = getattr(flags, name)
        chosen[name] = typed or max(usually, longest)
        if chosen[name] < longest:
            flag = name.replace("_", "-")
            print(f"warning: --{flag} {typed} cuts off {what}; the longest has {longest} tokens")
    return argparse.Namespace(**vars(flags) | chosen)
