"""What the tests share: the repository on the import path, one thread, a tiny model, tokenizers."""

import os
import random
import sys
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import pytest
import torch

from common import runtime
from common.puzzles import chains
from common.text import COCONUT_MARK, Example, Tokenizer
from tiny import tiny_model

torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"      # for the scripts that tests start


@pytest.fixture
def model():
    """3 layers, width 32, vocabulary 67, 96 positions; evaluation mode."""
    return tiny_model()


@pytest.fixture
def tok():
    """The special ids of the tiny model's vocabulary; ordinary ids are those below 60."""
    return SimpleNamespace(eos=62, bot=64, eot=65, pause=66)


@pytest.fixture
def machine():
    return runtime.Machine("cpu", "float32")


@pytest.fixture
def examples(tok):
    """Five Examples of the tiny vocabulary: questions of 1 to 30 tokens, 0 to 5 steps."""
    rng = random.Random(0)

    def ids(n):
        return [rng.randrange(60) for _ in range(n)]

    found = []
    for n_question, n_steps in ((9, 3), (30, 5), (1, 1), (5, 0), (14, 2)):
        question = ids(n_question)
        steps = [ids(rng.randrange(1, 6)) for _ in range(n_steps)]
        found.append(Example(question, steps, ids(rng.randrange(1, 4)) + [tok.eos]))
    return found


@pytest.fixture(scope="session")
def text_tok():
    """A compact tokenizer of chain problems."""
    return Tokenizer.compact("\n".join([d["question"], *d["steps"], COCONUT_MARK + d["answer"]])
                             for d in chains((400, 1, 1))["train"])
