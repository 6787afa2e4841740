"""From text to tensors and back: tokenizers, examples, sequences, batches.

An item is {"question": str, "steps": [str, ...], "answer": str}, as data_prep.py gives it. On the
way to the model it becomes an Example (token ids of its parts), then a Sequence (what is read and
what is predicted), then a row of a Batch (tensors).
"""

import argparse
import array
import collections.abc
import json
import math
import re
from typing import NamedTuple

import numpy as np
import tiktoken
import torch
from tqdm import tqdm

from common.runtime import UserError

# ---------------------------------------------------------------- tokenizers

SPECIAL = ("<|endoftext|>", "<bot>", "<eot>", "<pause>")
COCONUT_MARK = "### "               # what comes before an answer in Coconut's format
CODI_MARK = "The answer is: "       # in CODI's; student and teacher are compared at its ":"

# The patterns are written so that Python's re and tiktoken read them alike. GPT-2's takes a space
# into the number that follows it, so that "7" and " 7" are two unrelated tokens; numbers-apart
# gives that space to the word or sign before it, so a number is the same token everywhere. is-a
# also joins " is a" to the word before: in "Every cat is a" the last token then names the subject.
PATTERNS = {
    "gpt2": r"'(?:[sdmt]|ll|ve|re)| ?[^\W\d_]+| ?\d+| ?(?:[^\s\w]|_)+|\s+(?!\S)|\s+",
    "numbers-apart": r" ?[^\W\d]+(?: (?=\d))?|\d+| ?[^\s\w]+(?: (?=\d))?|\s+(?!\S)|\s+",
    "is-a": r" ?[^\W\d]+(?: is an?\b)?(?: (?=\d))?|\d+| ?[^\s\w]+(?: (?=\d))?|\s+(?!\S)|\s+",
}
COMPACT = {                         # --tokenizer -> the pattern of a compact tokenizer
    "compact": "numbers-apart",
    "compact-gpt2": "gpt2",
    "compact-is-a": "is-a",
}


class Tokenizer:
    """A tiktoken encoding plus <|endoftext|> (eos), <bot>, <eot> and <pause>, saved with the model.

    encode(text) -> ids, decode(ids) -> text; any text survives the round trip. The special tokens
    of a released model (see common/vocabulary.py) are ordinary text to encode; chat writes them.
    """

    def __init__(self, pattern, ranks, released=None):
        """pattern: how text is split into pieces. ranks: {piece (bytes): id}, 0 .. n - 1.
        released: what else the tokenizer of a released model has, or None: special {name: id}, eos
        (an id), bos (ids before every text), size (of its vocabulary), template (of a chat)."""
        self.pattern, self.ranks, self.released = pattern, ranks, released
        self.bos, self.template = [], None
        if released:
            special, self.bos, self.template = (released[k] for k in ("special", "bos", "template"))
            self.eos, first = released["eos"], released["size"]
        else:
            special = {SPECIAL[0]: len(ranks)}
            self.eos, first = len(ranks), len(ranks) + 1
        self.bot, self.eot, self.pause = range(first, first + 3)
        self.n_vocab = first + 3
        special = special | {name: first + i for i, name in enumerate(SPECIAL[1:])}
        unused = set(range(self.n_vocab)) - set(ranks.values()) - set(special.values())
        special |= {f"<unused {i}>": i for i in sorted(unused)}
        # a byte without a piece is left out, as the released tokenizers do
        missing = [bytes([b]) for b in range(256) if bytes([b]) not in ranks]
        known = ranks | {byte: self.n_vocab + i for i, byte in enumerate(missing)}
        encoding = tiktoken.Encoding("text", pat_str=pattern, mergeable_ranks=known,
                                     special_tokens=special)
        self.special, self.encode_all = special, encoding.encode_ordinary
        self.encode = self.encode_known if missing else encoding.encode_ordinary
        self.decode = encoding.decode

    def encode_known(self, text):
        """The ids of a text, without those of bytes that have no piece."""
        return [i for i in self.encode_all(text) if i < self.n_vocab]

    @classmethod
    def compact(cls, texts, pattern="numbers-apart", most=50000):
        """All 256 bytes and the `most` most frequent whole pieces of the texts, so that training
        from scratch is not spent on 50,257 rows of embeddings. tiktoken emits a known piece whole,
        others as bytes."""
        counts = collections.Counter()
        for text in texts:
            counts.update(re.findall(PATTERNS[pattern], text))
        frequent = [piece.encode() for piece, _ in counts.most_common(most)]
        pieces = [bytes([b]) for b in range(256)]
        pieces += sorted(piece for piece in frequent if len(piece) > 1)
        return cls(PATTERNS[pattern], {piece: i for i, piece in enumerate(pieces)})

    @classmethod
    def gpt2(cls):
        """GPT-2's own 50,256 pieces, downloaded by tiktoken. Raises UserError without network."""
        try:
            encoding = tiktoken.get_encoding("gpt2")
        except Exception as e:      # requests' own errors, which are not ours to import
            raise UserError(f"tiktoken cannot download the gpt2 tokenizer ({type(e).__name__}); "
                            "connect once, or set TIKTOKEN_CACHE_DIR to a folder that has "
                            "it") from None
        return cls(encoding._pat_str, encoding._mergeable_ranks)

    def chat(self, prompt, template=None):
        """The ids of a question as a chat model reads it. template: text with "{prompt}" in it, in
        which special tokens may be written (default: the model's own, or the question alone). In
        the prompt itself they are ordinary text."""
        template = template or self.template or "{prompt}"
        if template.count("{prompt}") != 1:
            raise UserError(f"the prompt template {template!r} needs {{prompt}} once, where the "
                            "question goes")
        names = "|".join(map(re.escape, sorted(self.special, key=len, reverse=True)))
        ids = [] if template.startswith(tuple(self.special)) else list(self.bos)
        for part in re.split(f"({names})", template):
            if part in self.special:
                ids.append(self.special[part])
            else:
                ids += self.encode(part.replace("{prompt}", prompt))
        return ids

    def state(self):
        """Plain values for a checkpoint; see from_state."""
        state = {"pattern": self.pattern, "pieces": [p.decode("latin-1") for p in self.ranks]}
        if self.released:
            state |= {"ids": list(self.ranks.values()), "released": self.released}
        return state

    @classmethod
    def from_state(cls, state):
        """The tokenizer whose state() this is."""
        pieces = [piece.encode("latin-1") for piece in state["pieces"]]
        ranks = dict(zip(pieces, state.get("ids", range(len(pieces)))))
        released = state.get("released")
        missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
        if missing and not released:
            raise ValueError(f"its tokenizer has no piece for byte {missing[0]}")
        return cls(state["pattern"], ranks, released)


def kept(items, kind, settings, make):
    """The bytes that make() makes of the items with these settings, as a uint8 array. Items of a
    file keep them in a file next to it (data_prep.Items.cached), other items do not."""
    if hasattr(items, "cached"):
        return items.cached(kind, settings, make)
    return np.frombuffer(make(), np.uint8)


def compact_tokenizer(items, mark, pattern):
    """Tokenizer.compact of the items, with `mark` before each answer. pattern: a name in
    PATTERNS."""
    def state():
        texts = ("\n".join([d["question"], *d["steps"], mark + d["answer"]]) for d in items)
        return json.dumps(Tokenizer.compact(texts, pattern).state()).encode()
    content = kept(items, "pieces", [mark, PATTERNS[pattern]], state)
    return Tokenizer.from_state(json.loads(content.tobytes()))


# ---------------------------------------------------------------- examples


class Example(NamedTuple):
    """One item as token ids, in the authors' text format."""
    question: list      # "question\n"
    steps: list         # one list per step, "step\n"
    answer: list        # "### answer" (CODI: "The answer is: answer") and eos


class Examples(collections.abc.Sequence):
    """Examples packed into one int32 array, perhaps a memory map; indexing gives lists again.

        n items | parts before each item, and in all | ids before each part, and in all | ids

    An item's parts are its question, its steps and its answer. lengths: an Example of arrays, the
    number of tokens of each question (n,), of each step (n, most steps of any item; 0 where an
    item has no such step) and of each answer (n,).
    """

    def __init__(self, packed):
        self.first, rest = np.split(packed[1:], [packed[0] + 1])
        self.start, self.ids = np.split(rest, [self.first[-1] + 1])
        parts, n_steps = np.diff(self.start), np.diff(self.first) - 2
        question, answer = self.first[:-1], self.first[1:] - 1
        steps = np.zeros((len(n_steps), n_steps.max(initial=0)), np.int32)
        is_step = np.arange(steps.shape[1]) < n_steps[:, None]
        steps[is_step] = np.delete(parts, [question, answer])
        self.lengths = Example(parts[question], steps, parts[answer])

    @classmethod
    def pack(cls, examples):
        """Examples one after the other -> the packed array."""
        first, start, ids = array.array("i", [0]), array.array("i", [0]), array.array("i")
        for example in examples:
            for part in (example.question, *example.steps, example.answer):
                ids.extend(part)
                start.append(len(ids))
            first.append(len(start) - 1)
        n = [len(first) - 1]
        return np.concatenate([np.array(a, np.int32) for a in (n, first, start, ids)])

    def __len__(self):
        return len(self.first) - 1

    def __getitem__(self, i):
        if isinstance(i, slice):
            return [self[j] for j in range(len(self))[i]]
        i = range(len(self))[i]                          # raises IndexError beyond the end
        start = self.start[self.first[i]:self.first[i + 1] + 1].tolist()
        question, *steps, answer = (self.ids[a:b].tolist() for a, b in zip(start, start[1:]))
        return Example(question, steps, answer)


def tokenize(items, tok, block_size, n_extra, where, mark=COCONUT_MARK, advice="remove the item"):
    """Examples of the items, with `mark` before each answer.

    Raises UserError, naming `where` (a file) and the item and giving advice, for an item that does
    not fit into block_size positions with its steps and n_extra more (thoughts, <bot>, <eot>).
    """
    def example(item):
        return Example(tok.bos + tok.encode(item["question"] + "\n"),
                       [tok.encode(step + "\n") for step in item["steps"]],
                       tok.encode(mark + item["answer"]) + [tok.eos])

    def make():
        bar = tqdm(items, "tokens", disable=None, leave=False, delay=2)
        return Examples.pack(map(example, bar))

    examples = Examples(kept(items, "tokens", [tok.state(), mark], make).view(np.int32))
    question, steps, answer = examples.lengths
    n = question + steps.sum(1) + answer + n_extra
    if (n > block_size).any():
        i = np.argmax(n > block_size)
        raise UserError(f"{where}, item {i + 1}, takes {n[i]} positions with its thoughts, more "
                        f"than block_size {block_size}; {advice}")
    return examples


def with_digit(items):
    """Which items have an answer that begins with a digit: their numbers (--digits-only). Raises
    UserError if none has."""
    def make():
        return bytes(item["answer"][:1].isdecimal() for item in items)
    rows = np.flatnonzero(kept(items, "digits", [], make))
    if not len(rows):
        raise UserError("--digits-only: no answer of the training data begins with a digit; give "
                        "--no-digits-only.")
    return rows


def beginning(text):
    """argparse type of --distill-at: how CODI_MARK begins."""
    if not text.strip() or not CODI_MARK.startswith(text):
        raise argparse.ArgumentTypeError(f"{text!r} is no beginning of {CODI_MARK!r}, as 'The' is")
    return text


def colon_in(answer, tok, text, where):
    """Which token of an answer (ids of "The answer is: X") ends `text`, a beginning of CODI_MARK:
    the state at that token predicts what follows. Best with the spaces of `text`, else with others:
    GPT-2 has " 7" in one token after ":", a Llama ":", " ", "7".

    The search begins where the answer does, so the same words in the question or in a step do not
    mislead it. Raises UserError, naming `where` (file and item), if no token ends there.
    """
    said = [tok.decode(answer[:i + 1]) for i in range(len(answer))]
    if text in said:
        return said.index(text)
    for i in range(len(answer)):
        if said[i].rstrip() == text.rstrip():
            return i
    raise UserError(f"{where}: in {tok.decode(answer)!r} no token ends where {text!r} does; choose "
                    "another --distill-at.")


def colons(examples, tok, text, where, rows=None):
    """colon_in of the answer of each of the Examples, (n,); found once for all that begin alike.
    rows: look only at these."""
    rows = np.arange(len(examples)) if rows is None else rows
    at, start = np.full(len(examples), -1), examples.start[examples.first[1:] - 1]
    while (left := rows[at[rows] < 0]).size:
        answer = examples[left[0]].answer
        i = colon_in(answer, tok, text, f"{where}, item {left[0] + 1}")
        beginnings = np.take(examples.ids, start[left, None] + np.arange(i + 1), mode="clip")
        at[left[(beginnings == answer[:i + 1]).all(1)]] = i
    return at


# ---------------------------------------------------------------- sequences and batches


class Sequence(NamedTuple):
    """What a model reads and what it is to write, for one example:

        prompt          n_latent     language
        q1 q2 q3 <bot>  o  o         <eot>  s1  s2  a1  eos        o: a continuous thought
                                       |     |   |   |
                                       v     v   v   v             logits there predict
                                       s1   s2  a1  eos

        q1 q2           none         q3     s1  s2  a1  eos        without thoughts

    The first token of language is given, not predicted. It is the last token of what is read:
    <eot>, or without thoughts the question's last token. Its logits predict language[1], those of
    language[1] predict language[2], and so on: len(language) - 1 labels. To decode, a model needs
    prompt, n_latent and language[:1].
    """
    prompt: list       # token ids, given
    n_latent: int      # how many continuous thoughts follow
    language: list     # token ids: one that is given, then those that are predicted


class Batch(NamedTuple):
    """B Sequences as tensors, laid out so that the first thoughts of all rows share a column:

        - - q q q <bot> | o o o | <eot> s s s a a eos          o: a continuous thought
        q q q q q <bot> | o o o | <eot> a a eos  -  -          -: padding
    """
    prompt: torch.Tensor      # (B, Tq) ids, left-padded
    keep: torch.Tensor        # (B, Tq) bool, True where the prompt is real
    latent: torch.Tensor      # (B, k) bool, True where the row has its i-th thought
    language: torch.Tensor    # (B, Tl) ids, right-padded
    where: torch.Tensor       # (N,) positions in the flattened language that have a label
    labels: torch.Tensor      # (N,) ids: the token after each of those
    n_language: torch.Tensor  # (B,) how many tokens of language a row has
    positions: int            # real positions, thoughts counted: for tokens per second


def collate(sequences, pad, device="cpu"):
    """The Batch of B Sequences; what a method adds to them is passed over. pad: the id that fills
    up the rows."""
    B = len(sequences)
    Tq = max(len(prompt) for prompt, *_ in sequences)
    k = max(n for _, n, *_ in sequences)
    Tl = max(len(language) for _, _, language, *_ in sequences)
    prompt, keep = np.full((B, Tq), pad), np.zeros((B, Tq), bool)
    language, has_label = np.full((B, Tl), pad), np.zeros((B, Tl), bool)
    n_latent = np.zeros((B, 1), int)
    for row, (given, n, words, *_) in enumerate(sequences):
        prompt[row, Tq - len(given):] = given
        keep[row, Tq - len(given):] = True
        n_latent[row] = n
        language[row, :len(words)] = words
        has_label[row, :len(words) - 1] = True
    latent = np.arange(k) < n_latent                                # (B, k)
    where = np.flatnonzero(has_label)
    labels = language.ravel()[where + 1]
    arrays = prompt, keep, latent, language, where, labels, has_label.sum(1) + 1
    return Batch(*(torch.from_numpy(a).to(device) for a in arrays),
                 positions=int(keep.sum() + n_latent.sum() + has_label.sum() + B))


def batches(lengths, batch_size, rng):
    """One epoch: a list of index arrays of batch_size (the last may be smaller), in random order.

    lengths [(prompt, language), ...] in tokens. Items alike in both share a batch, which keeps
    padding under 10 % (ProsQA 1 %, GSM8k-Aug 6 to 8 %): shuffle; cut into stretches of up to
    16 x 16 batches; sort each by prompt and, within 1/16 of that, by language; shuffle the batches.
    """
    lengths = np.asarray(lengths)
    order, groups = rng.permutation(len(lengths)), []
    for stretch in np.split(order, range(256 * batch_size, len(order), 256 * batch_size)):
        n_batches = -(-len(stretch) // batch_size)
        side = round(math.sqrt(n_batches)) * batch_size
        stretch = stretch[np.argsort(lengths[stretch, 0], kind="stable")]
        for band in np.split(stretch, range(side, len(stretch), side)):
            band = band[np.argsort(lengths[band, 1], kind="stable")]
            groups += np.split(band, range(batch_size, len(band), batch_size))
    return [groups[i] for i in rng.permutation(len(groups))]
