"""What the tests share: the repository on the import path, one thread, a tiny model, tokenizers,
finished runs."""

import contextlib
import os
import random
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import pytest
import tiktoken
import torch

import data_prep
import stress
import test_codi
import test_runs
from both_cores import pytest_runtestloop      # pytest looks for it here
from common import evaluation, runtime
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


# ---------------------------------------------------------------- runs, made once for all tests

@pytest.fixture(scope="session", autouse=True)
def one_is_timed():
    """Nobody asks how fast the tiny models are: one question is timed, not 20."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluation, "N_TIMED", 1)
        yield


@pytest.fixture(autouse=True)
def signals():
    """A run changes the signal handlers of this process; put them back."""
    before = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    yield
    for s, handler in before.items():
        signal.signal(s, handler)


@pytest.fixture
def gpt2_tokenizer(monkeypatch):
    """A stand-in of 257 pieces for the tokenizer that tiktoken downloads."""
    ranks = {bytes([b]): b for b in range(256)} | {b"<<": 256}
    encoding = tiktoken.Encoding("gpt2", pat_str=r"<<|\w+|\W", mergeable_ranks=ranks,
                                 special_tokens={})
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: {"gpt2": encoding}[name])


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """A folder of two-step chain problems, 24 to train on."""
    folder = tmp_path_factory.mktemp("data") / "tiny-chains"
    data_prep.write_dataset(folder, chains((24, 6, 8), n_steps=2, limit=8))
    return folder


@pytest.fixture(scope="session")
def finished(data, tmp_path_factory):
    """{variant: folder of an uninterrupted run of coconut.py}; what it printed is next to it."""
    folders = {}
    for name, more in test_runs.VARIANTS.items():
        folders[name] = tmp_path_factory.mktemp(name) / "run"
        with (open(folders[name].with_name("printed.txt"), "w") as printed,
              contextlib.redirect_stdout(printed)):
            assert test_runs.run(test_runs.start(data, folders[name], more)) == 0
    return folders


@pytest.fixture(scope="session")
def codi_run(data, tmp_path_factory):
    """The folder of a run of codi.py."""
    out = tmp_path_factory.mktemp("codi") / "run"
    assert test_codi.run(test_codi.start(data, out)) == 0
    return out


@pytest.fixture(scope="session")
def known(tmp_path_factory):
    """{script: {file: bytes}}: a finished best.pt, the last.pt of a run that is not over."""
    return stress.checkpoints(tmp_path_factory.mktemp("known"))
