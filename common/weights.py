"""Files of weights. What a file is, its content decides, never its name:

    a checkpoint of this project    config, model, tokenizer, flags, ..
    GPT-2 of Hugging Face           wte.weight, wpe.weight, h.0.attn.c_attn.weight, .., and next to
                                    the file perhaps a config.json with what weights do not show

Everything else that people have at hand is refused with a sentence on what it is and what to do.
Only tensors and plain values are read (weights_only): no code in a file is run.
"""

import dataclasses
import json
import os
import pickle
import re
import warnings
import zipfile

import torch

from common import optim, settings, text
from common.runtime import UserError, count, first_line
from gpt2 import GPT2, GPT2Config, PRESETS, RELEASED

CHECKPOINT = ("config", "model", "tokenizer", "flags")     # what each of this project's holds
# what wrappers put into the names of weights: DDP, torch.compile, FSDP, Hugging Face's heads
WRAPPERS = ("module", "_orig_mod", "_fsdp_wrapped_module", "transformer")
AGAIN = "copy or download it again"

# config.json of Hugging Face: each field that changes what GPT-2 computes, with the values that
# mean what gpt2.py computes. A field that is not there has the first of them.
COMPUTED = {
    "model_type": ("gpt2",),
    "activation_function": ("gelu_new", "gelu_pytorch_tanh", "gelu_fast", "gelu_accurate"),
    "layer_norm_epsilon": (1e-5,),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "tie_word_embeddings": (True,),
    "add_cross_attention": (False,),
    "is_encoder_decoder": (False,),
    "pruned_heads": ({}, None),
    "quantization_config": (None,),
    "auto_map": (None,),                                    # code of its own
}
ARCHITECTURES = ("GPT2Model", "GPT2LMHeadModel", "GPT2DoubleHeadsModel")
SIZES = {                   # field of config.json -> its other name there, its name in GPT2Config
    "vocab_size": ("vocab_size", "vocab_size"),
    "n_positions": ("max_position_embeddings", "block_size"),
    "n_layer": ("num_hidden_layers", "n_layer"),
    "n_embd": ("hidden_size", "n_embd"),
    "n_head": ("num_attention_heads", "n_head"),
}


# ---------------------------------------------------------------- any file


def read(path):
    """What torch.save wrote to a file: tensors and plain values, on the CPU.

    Raises FileNotFoundError, or UserError with what the file is instead.
    """
    if os.path.isdir(path):
        for name in ("best.pt", "last.pt", "pytorch_model.bin"):
            if os.path.exists(os.path.join(path, name)):
                raise UserError(f"{path}: a folder; give the file {os.path.join(path, name)}.")
        raise UserError(f"{path}: a folder without a best.pt or pytorch_model.bin; if it holds a "
                        f"GPT-2 in other files, {one_file(path)}.")
    with open(path, "rb") as f:
        what = foreign(path, f)
        if what:
            raise UserError(f"{path}: {what}.")
        f.seek(0)
        return unpickled(path, f)


def unpickled(path, f):
    """What torch.load reads in an open file (given its path, it would go by the name). Raises
    UserError."""
    try:
        with warnings.catch_warnings(action="ignore"):       # on what a damaged file may be
            return torch.load(f, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        refused = re.search(r"GLOBAL (\S+)", str(error))
        name_is_cut = not f.read(1) and not zipfile.is_zipfile(path)
        if not refused or name_is_cut:
            raise UserError(f"{path}: cut off or damaged; {AGAIN}.") from None
        raise UserError(f"{path}: holds Python objects ({refused[1]}), a whole pickled model "
                        "perhaps, which can run code and are not read; save only its weights: "
                        "torch.save(model.state_dict(), 'pytorch_model.bin').") from None
    except Exception:                # whatever the unpickler meets in a damaged file
        raise UserError(f"{path}: not what torch.save writes, or cut off or damaged; "
                        f"{AGAIN}.") from None


def foreign(path, f):
    """What a file is that torch.load cannot read, by its first bytes, and what to do; or None. f:
    the file, opened in binary."""
    head, folder = f.read(512), os.path.dirname(path) or "."
    if not head:
        return f"an empty file; {AGAIN}"
    if head.startswith(b"version https://git-lfs"):
        return "a pointer of Git LFS, not the weights; get those with: git lfs pull"
    if head.lstrip()[:1] == b"<":
        return "a web page, not weights; download the file itself"
    if head.lstrip()[:1] in (b"{", b"["):
        if b'"weight_map"' in head + f.read(1 << 24):
            return f"the index of weights in several files (shards); {one_file(folder)}"
        return "JSON text, not weights; give the file of the weights"
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 1 << 30:
        return f"a safetensors file, which is not read here; {one_file(folder)}"
    for magic, name in ((b"GGUF", "llama.cpp (GGUF)"), (b"\x89HDF", "TensorFlow (HDF5)")):
        if head.startswith(magic):
            return f"weights of {name}, which are not read here; give a GPT-2 pytorch_model.bin"
    if head.startswith(b"PK"):
        try:
            names = [name.rpartition("/")[2] for name in zipfile.ZipFile(path).namelist()]
        except (zipfile.BadZipFile, NotImplementedError, ValueError, OSError):   # of any damage
            return f"cut off or damaged; {AGAIN}"
        if "constants.pkl" in names:
            return ("a TorchScript program; save only its weights: "
                    "torch.save(torch.jit.load(FILE).state_dict(), 'pytorch_model.bin')")
        if "data.pkl" not in names:
            return "a zip archive that torch.save did not write; give the file in it"
    return None


def one_file(folder):
    """How Hugging Face's library makes one pytorch_model.bin of what is in a folder."""
    model = f"transformers.GPT2LMHeadModel.from_pretrained({folder!r})"
    return (f"make a pytorch_model.bin of it: torch.save({model}.state_dict(), "
            f"{os.path.join(folder, 'pytorch_model.bin')!r})")


def plain_names(state, path):
    """A state dict without the prefixes that wrappers of a model put into the names of its weights.
    Raises UserError where two names become one."""
    plain = {}
    for name, value in state.items():
        short = ".".join(part for part in str(name).split(".") if part not in WRAPPERS)
        if short in plain:
            raise UserError(f"{path}: has the weight {short} twice, once as {name}.")
        plain[short] = value
    return plain


def check_finite(state, path):
    """Raises UserError if a weight of a state dict is not a finite number."""
    for name, value in state.items():
        readable = torch.is_tensor(value) and value.layout == torch.strided and not value.is_meta
        if readable and not value.isfinite().all():
            raise UserError(f"{path}: the weight {name} has values that are not finite; take "
                            "another file.")


# ---------------------------------------------------------------- checkpoints of this project


RENAMED = {"pause-multipass": "pause-as-thought"}    # a method of old checkpoints; it was the same
# name -> kind of what a config holds
CONFIG = settings.kinds(settings.SHARED) | dict(block_size=count(1), vocab_size=count(1),
                                                switch=bool)


def is_checkpoint(content):
    """Is this, from a file, a checkpoint of this project?"""
    return isinstance(content, dict) and content.keys() >= set(CHECKPOINT)


def load_checkpoint(path):
    """Read a checkpoint of this project. Raises UserError if the file is none."""
    try:
        return checkpoint(read(path), path)
    except FileNotFoundError:
        raise UserError(f"{path}: no such checkpoint; train one first, "
                        "or check the path.") from None


def checkpoint(content, path):
    """A checkpoint of this project, from a file's content. Raises UserError on any other."""
    if not is_checkpoint(content):
        if is_gpt2(content):
            raise UserError(f"{path}: weights of a GPT-2, not a checkpoint of this project; "
                            "train from it with --init.")
        raise UserError(f"{path}: not a checkpoint of this project ({holds(content)}).")
    for key in (*CHECKPOINT, "at", "projection"):
        if not isinstance(content.get(key, {}), dict):
            raise UserError(f"{path}: not a checkpoint of this project ({key} is a "
                            f"{type(content[key]).__name__}).")
    settings.check(content["config"], CONFIG, path)
    settings.check(content["flags"], dict(method=str, prompt=str), path)
    settings.check_flags(content["flags"], settings.PLAIN, path)
    state = dict(content, model=plain_names(content["model"], path))
    if content.get("projection"):
        state["projection"] = plain_names(content["projection"], path)
        check_finite(state["projection"], path)
    method = state["flags"].get("method")
    if method in RENAMED:
        state["flags"]["method"] = RENAMED[method]
    return state


def load_model(state, dropout=0.0, where="checkpoint"):
    """Model and tokenizer of a checkpoint of this project; LoRA's updates are merged in. Raises
    UserError, naming `where`, if its parts do not go together."""
    flags = state["flags"]
    known = [field.name for field in dataclasses.fields(GPT2Config)]
    for name in state["config"]:
        if name not in known:
            raise UserError(f"{where}: its config has {name}, which gpt2.py does not know; use the "
                            "version that wrote it.")
    try:
        model = GPT2(GPT2Config(**state["config"] | dict(dropout=dropout)))
        merged = optim.merged(state["model"], flags.get("lora_alpha"), flags.get("lora_r"))
        model.load(merged, "its model")
        tok = text.Tokenizer.from_state(state["tokenizer"])
    except Exception as error:           # whatever a damaged one leads to
        raise UserError(f"{where}: a checkpoint that this version cannot use "
                        f"({first_line(error).rstrip('.')}).") from None
    check_finite(model.state_dict(), where)
    return model, tok


def load_into(module, saved, where):
    """Give a module the weights of a state dict. Raises UserError, naming `where`, if they are not
    its own."""
    try:
        module.load_state_dict(saved)
    except Exception as error:           # whatever a damaged one leads to
        why = (str(error) or type(error).__name__).splitlines()[-1].strip()
        raise UserError(f"{where}: a checkpoint that this version cannot use "
                        f"({why.rstrip('.')}).") from None


# ---------------------------------------------------------------- GPT-2 of Hugging Face


def is_gpt2(content):
    """Is this, from a file, the state dict of a GPT-2, wrapped or not?"""
    own = ("wte.weight", "wpe.weight", "attn.c_attn.weight", "mlp.c_fc.weight", "ln_f.weight")
    return isinstance(content, dict) and any(str(name).endswith(own) for name in content)


def holds(content):
    """What a file holds that is neither, in words."""
    if not isinstance(content, dict):
        return f"it holds a {type(content).__name__}, not named weights"
    if content.keys() >= {"state", "param_groups"}:
        return "it holds the state of an optimizer, no weights"
    for key, value in content.items():
        if is_gpt2(value):
            return (f"its weights are under the key {key!r}: save only them, "
                    f"torch.save(torch.load(FILE)[{key!r}], 'pytorch_model.bin')")
    names = ", ".join(map(str, list(content)[:4]))
    return f"it holds {names or 'nothing'}{', ..' if len(content) > 4 else ''}"


def downloaded(name):
    """The file of released weights, a name in PRESETS: downloaded once, by torch.hub."""
    path = os.path.join(torch.hub.get_dir(), "checkpoints", f"{name}.bin")
    if not os.path.exists(path):
        os.makedirs(os.path.dirname(path), exist_ok=True)
        torch.hub.download_url_to_file(RELEASED.format(name), path)
    return path


def read_config(path):
    """The config.json next to a file of weights, or None if there is none. Raises UserError,
    naming the field, if it says that something else is computed than by gpt2.py."""
    where = os.path.join(os.path.dirname(path), "config.json")
    if not os.path.exists(where):
        return None
    try:
        with open(where, encoding="utf-8-sig") as f:
            config = json.load(f)
    except (OSError, ValueError, RecursionError):
        config = None
    if not isinstance(config, dict):
        raise UserError(f"{where}: not a JSON object; it is read with the weights next to it.")
    for name, same in COMPUTED.items():
        value = config.get(name, same[0])
        if value not in same:
            raise UserError(f"{where}: {name} is {json.dumps(value)}, but gpt2.py computes GPT-2 "
                            f"with {json.dumps(same[0])}; its weights cannot be used here.")
    architectures = config.get("architectures") or []
    if not isinstance(architectures, list) or set(map(str, architectures)) - set(ARCHITECTURES):
        raise UserError(f"{where}: architectures is {json.dumps(architectures)}, but gpt2.py is a "
                        "GPT2LMHeadModel; its weights cannot be used here.")
    n_embd = config.get("hidden_size", config.get("n_embd", 768))
    n_inner = config.get("n_inner")
    if n_inner is not None and not (isinstance(n_embd, int) and n_inner == 4 * n_embd):
        raise UserError(f"{where}: n_inner is {json.dumps(n_inner)}, but gpt2.py computes GPT-2 "
                        f"with 4 * n_embd; its weights cannot be used here.")
    return config


def check_sizes(config, model, where):
    """Raises UserError where a size in a config.json is not that of the weights next to it."""
    own = vars(model.config)
    for name, (other, ours) in SIZES.items():
        for field in (name, other):
            if config.get(field, own[ours]) != own[ours]:
                raise UserError(f"{where}: {field} in the config.json next to it is "
                                f"{json.dumps(config[field])}, the weights have {own[ours]}; "
                                "give them their own config.json.")


def gpt2(content, path, dropout=0.0, n_head=None):
    """The GPT2 of a state dict, from a file's content, and of the config.json next to that file.

    n_head, which weights do not show: given, or config.json's (12 if it does not say, as in Hugging
    Face), or without one heads have 64 channels, as in every released GPT-2, and that is said.
    Raises UserError, naming the field or the weight, where this is no GPT-2 or not that of gpt2.py.
    """
    if not is_gpt2(content):
        raise UserError(f"{path}: neither a checkpoint of this project nor weights of a GPT-2 "
                        f"({holds(content)}).")
    state = plain_names(content, path)
    config = None
    if n_head is None:
        config = read_config(path)
    if config is not None:
        n_head = config.get("num_attention_heads", config.get("n_head", 12))
        if type(n_head) is not int or n_head < 1:
            raise UserError(f"{path}: n_head in the config.json next to it is "
                            f"{json.dumps(n_head)}, not a number of heads.")
    try:
        model = GPT2.from_huggingface(state, path, dropout, n_head)
    except ValueError as error:
        if re.search(r"-\d+-of-\d+", os.path.basename(path)):
            folder = os.path.dirname(path) or "."
            error = f"{path}: one of several files of weights (shards); {one_file(folder)}."
        raise UserError(error) from None
    check_finite(model.state_dict(), path)
    if config is not None:
        check_sizes(config, model, path)
    elif n_head is None:
        print(f"{path}: no config.json next to it says how many heads there are; taken to have 64 "
              f"channels each, as in GPT-2: n_head {model.config.n_head}")
    return model


def pretrained(name_or_path, dropout=0.0, n_head=None):
    """Released GPT-2 weights: a name in PRESETS (downloaded once) or a file. Raises OSError, or
    UserError as read and gpt2 do."""
    path = name_or_path
    if path in PRESETS:
        path, n_head = downloaded(path), PRESETS[path]["n_head"]
    return gpt2(read(path), path, dropout, n_head)


# ---------------------------------------------------------------- the model of a run


def new_model(flags, items, mark):
    """Model and tokenizer for --init scratch. items: the training split."""
    if flags.tokenizer == "gpt2":
        tok = text.Tokenizer.gpt2()
    else:
        tok = text.compact_tokenizer(items, mark, text.COMPACT[flags.tokenizer])
    return GPT2(GPT2Config(flags.block_size, tok.n_vocab, flags.n_layer, flags.n_head, flags.n_embd,
                           flags.dropout, flags.embd_std, flags.state_std)), tok


def open_weights(flag, name, dropout=0.0):
    """Model, tokenizer and checkpoint of what a flag names: a checkpoint of this project, or else
    released GPT-2 weights, a name or a file, with embeddings for the special tokens; the checkpoint
    is then {}. Raises UserError."""
    try:
        content = None if name in PRESETS else read(name)
        if is_checkpoint(content):
            state = checkpoint(content, name)
            return *load_model(state, dropout, name), state
        model = pretrained(name, dropout) if content is None else gpt2(content, name, dropout)
    except FileNotFoundError:
        raise UserError(f"{flag} {name}: no such file; give a checkpoint of this project, a GPT-2 "
                        f"pytorch_model.bin, or one of {', '.join(PRESETS)}.") from None
    except OSError as error:
        raise UserError(f"{flag} {name}: no weights to be had there ({first_line(error)}); "
                        "give the path of a GPT-2 pytorch_model.bin that is at hand.") from None
    except UserError as error:
        raise UserError(f"{flag} {error}") from None
    tok = text.Tokenizer.gpt2()
    try:
        return model.grow_for(tok), tok, {}
    except ValueError as error:
        raise UserError(f"{flag} {name}: {error}.") from None
