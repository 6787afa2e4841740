"""A GPT-2 small enough for a test. Its weights are a recipe, so no file has to travel.

numpy's RandomState gives the same stream in every version: same seed, same weights, everywhere.
"""

from types import SimpleNamespace

import numpy as np
import torch

import codi
import data_prep
from common.experiment import Setup
from gpt2 import GPT2

SHAPE = dict(vocab_size=67, n_positions=96, n_embd=32, n_layer=3, n_head=4)


def weights(seed=0, vocab_size=67, n_positions=96, n_embd=32, n_layer=3, n_head=4):
    """State dict in the Hugging Face GPT-2 layout, where Conv1D matrices are (in, out).

    Drawn in sorted order of the names from a standard normal n: scales of LayerNorm are 1 + 0.1 n,
    every bias 0.1 n, every matrix 0.15 n.
    """
    C = n_embd
    shapes = {"wte.weight": (vocab_size, C), "wpe.weight": (n_positions, C), "ln_f.weight": (C,),
              "ln_f.bias": (C,)}
    matrices = {"attn.c_attn": (C, 3 * C), "attn.c_proj": (C, C), "mlp.c_fc": (C, 4 * C),
                "mlp.c_proj": (4 * C, C)}
    for i in range(n_layer):
        for name, (wide, out) in matrices.items():
            shapes |= {f"h.{i}.{name}.weight": (wide, out), f"h.{i}.{name}.bias": (out,)}
        for name in ("ln_1", "ln_2"):
            shapes |= {f"h.{i}.{name}.weight": (C,), f"h.{i}.{name}.bias": (C,)}
    rng, state = np.random.RandomState(seed), {}
    for name in sorted(shapes):
        n = torch.from_numpy(rng.standard_normal(shapes[name]).astype(np.float32))
        if name.endswith("bias"):
            value = 0.1 * n
        elif "ln_" in name:
            value = 1 + 0.1 * n
        else:
            value = 0.15 * n
        state["transformer." + name] = value
    return state


def tiny_model(seed=0, **shape):
    """The recipe's model in evaluation mode."""
    shape = SHAPE | shape
    return GPT2.from_huggingface(weights(seed, **shape), n_head=shape["n_head"]).eval()


def decoding(max_new=12, **changed):
    """The flags that coconut.think_and_answer reads."""
    flags = dict(max_new=max_new, method="coconut", thoughts="keep", calculator=False, seed=0)
    return SimpleNamespace(**flags | changed)


def codi_flags(**changed):
    """The flags that codi.py's functions read."""
    return SimpleNamespace(**codi.DEFAULTS | dict(keep_last_step=False, max_new=12) | changed)


def setup_of(model, tok, machine, flags, projection=None):
    """The Setup, `s`, of a model that was not loaded from a file."""
    return Setup(flags, machine, model, tok, projection)


def write_lengths(folder, step, answers=("1", "2")):
    """Write problems of one and of two such steps, which are learned in seconds. All questions have
    the same length and known words, as decoding is tested here, not what was understood."""
    splits = dict(train=[], valid=[], test=[])
    for i in range(64):
        split = {0: "valid", 1: "test"}.get((i // 8 + i % 8) % 8, "train")
        for n, word in enumerate(("one", "two"), 1):
            splits[split].append(dict(question=f"{word} {i // 8} {i % 8}", steps=[step] * n,
                                      answer=answers[n - 1]))
    data_prep.write_dataset(folder, splits)
