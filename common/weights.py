"""Weights: those of this project, and released ones. What a file is, its content decides:

    a checkpoint of this project    config, model, tokenizer, flags, ..
    GPT-2 of Hugging Face           wte.weight, wpe.weight, h.0.attn.c_attn.weight, .., and next to
                                    the file perhaps a config.json with what weights do not show
    a Llama                         see common/llama_files.py

Everything else is refused with a sentence on what it is and what to do. See common/formats.py for
how files are read.
"""

import dataclasses
import json
import os

import torch

from common import formats, llama_files, optim, settings, text
from common.formats import read
from common.runtime import UserError, count, first_line, real
from gpt2 import GPT2, GPT2Config, PRESETS, RELEASED
from llama import Llama, LlamaConfig

RELEASES = (*PRESETS, "smollm2")                 # what has a name, and is downloaded if need be
CHECKPOINT = ("config", "model", "tokenizer", "flags")     # what each of this project's holds
FURTHER = ("projection", "decoder")               # modules that some hold next to the model
# what wrappers put into the names of weights: DDP, torch.compile, FSDP, Hugging Face's heads
WRAPPERS = ("module", "_orig_mod", "_fsdp_wrapped_module", "transformer")

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


# ---------------------------------------------------------------- any weights


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
CONFIG = settings.kinds(settings.SHARED) | dict(
    block_size=count(1), vocab_size=count(1), switch=bool, n_kv_head=count(1), n_hidden=count(1),
    norm_eps=real(1e-20, 1), rope_base=real(1, 1e12), rope_factor=real(1), rope_low=real(),
    rope_high=real(), rope_original=count(1), tied=bool)


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
        for what, is_one in (("GPT-2", is_gpt2), ("Llama", llama_files.is_llama)):
            if is_one(content):
                raise UserError(f"{path}: weights of a {what}, not a checkpoint of this project; "
                                "train from it with --init.")
        raise UserError(f"{path}: not a checkpoint of this project ({holds(content)}).")
    for key in (*CHECKPOINT, "at", *FURTHER):
        if not isinstance(content.get(key, {}), dict):
            raise UserError(f"{path}: not a checkpoint of this project ({key} is a "
                            f"{type(content[key]).__name__}).")
    settings.check(content["config"], CONFIG, path)
    settings.check(content["flags"], dict(method=str, prompt=str), path)
    settings.check_flags(content["flags"], settings.PLAIN, path)
    state = dict(content, model=plain_names(content["model"], path))
    for name in FURTHER:
        if content.get(name):
            state[name] = plain_names(content[name], path)
            check_finite(state[name], path)
    method = state["flags"].get("method")
    if method in RENAMED:
        state["flags"]["method"] = RENAMED[method]
    return state


def load_model(state, dropout=0.0, where="checkpoint"):
    """Model and tokenizer of a checkpoint of this project; LoRA's updates are merged in. Raises
    UserError, naming `where`, if its parts do not go together."""
    flags = state["flags"]
    kind, file = GPT2Config, "gpt2.py"
    if "n_kv_head" in state["config"]:
        kind, file = LlamaConfig, "llama.py"
    known = [field.name for field in dataclasses.fields(kind)]
    for name in state["config"]:
        if name not in known:
            raise UserError(f"{where}: its config has {name}, which {file} does not know; use the "
                            "version that wrote it.")
    try:
        config = kind(**state["config"] | dict(dropout=dropout))
        merged = optim.merged(state["model"], flags.get("lora_alpha"), flags.get("lora_r"))
        if kind is LlamaConfig:
            model = Llama.from_weights(config, merged, "its model")
        else:
            model = GPT2(config).load(merged, "its model")
        tok = text.Tokenizer.from_state(state["tokenizer"])
    except Exception as error:           # whatever a damaged one leads to
        raise UserError(f"{where}: a checkpoint that this version cannot use "
                        f"({first_line(error).rstrip('.')}).") from None
    if tok.n_vocab != config.vocab_size:
        raise UserError(f"{where}: damaged (its tokenizer has {tok.n_vocab} tokens, its model "
                        f"{config.vocab_size}); {formats.AGAIN}.")
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
    config = formats.read_config(path, COMPUTED, ARCHITECTURES, "gpt2.py", "GPT-2")
    if config is None:
        return None
    n_embd = config.get("hidden_size", config.get("n_embd", 768))
    n_inner = config.get("n_inner")
    if n_inner is not None and not (isinstance(n_embd, int) and n_inner == 4 * n_embd):
        where = os.path.join(formats.folder_of(path), "config.json")
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
        raise UserError(formats.shard(path) or error) from None
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
                           flags.dropout, flags.embd_std, flags.pos_std, flags.state_std)), tok


def open_weights(flag, name, dropout=0.0):
    """Model, tokenizer and checkpoint of what a flag names: a checkpoint of this project, or else
    released weights, a name or a file, with embeddings for the special tokens; the checkpoint is
    then {}. Raises UserError."""
    try:
        path = llama_files.smollm2() if name == "smollm2" else name
        content = None if name in PRESETS else read(path)
        if is_checkpoint(content):
            state = checkpoint(content, path)
            return *load_model(state, dropout, path), state
        if isinstance(content, formats.GGUF) or llama_files.is_llama(content):
            model, tok = llama(content, path, dropout)
        else:
            model = pretrained(name, dropout) if content is None else gpt2(content, path, dropout)
            tok = None
    except FileNotFoundError:
        raise UserError(f"{flag} {name}: no such file; give a checkpoint of this project, a GPT-2 "
                        "pytorch_model.bin, a folder of Hugging Face, a .gguf file, or one of "
                        f"{', '.join(RELEASES)}.") from None
    except OSError as error:
        raise UserError(f"{flag} {name}: no weights to be had there ({first_line(error)}); "
                        "give the path of a GPT-2 pytorch_model.bin that is at hand.") from None
    except UserError as error:
        raise UserError(f"{flag} {error}") from None
    tok = tok or text.Tokenizer.gpt2()
    try:
        return model.grow_for(tok), tok, {}
    except ValueError as error:
        raise UserError(f"{flag} {name}: {error}.") from None


def llama(content, path, dropout):
    """Llama and Tokenizer of what a file holds, a GGUF or a state dict. Raises UserError."""
    if isinstance(content, formats.GGUF):
        model, tok = llama_files.of_gguf(content, path, dropout)
    else:
        model, tok = llama_files.of_folder(plain_names(content, path), path, dropout)
    check_finite(model.state_dict(), path)
    return model, tok
