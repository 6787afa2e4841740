"""A Llama small enough for a test, and the files that hold one: of Hugging Face, and GGUF."""

import json
import struct
from pathlib import Path

import numpy as np
import torch

from common.vocabulary import BYTES
from llama import Llama, LlamaConfig

FILE = Path(__file__).parent / "golden" / "llama_tiny_seed0.json"
GOLDEN = json.loads(FILE.read_text())["tiny"]
SHAPE = GOLDEN["shape"]
DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
OF_BYTE = {byte: character for character, byte in BYTES.items()}


def weights(seed=0, **changed):
    """State dict of the golden file's recipe, in Hugging Face's names: sorted, normal numbers n;
    norms are 1 + 0.1 n, others 0.2 n."""
    shape = SHAPE | changed
    C, wide = shape["hidden_size"], shape["intermediate_size"]
    keys = shape["num_key_value_heads"] * C // shape["num_attention_heads"]
    sizes = {"input_layernorm": (C,), "post_attention_layernorm": (C,), "self_attn.q_proj": (C, C),
             "self_attn.k_proj": (keys, C), "self_attn.v_proj": (keys, C),
             "self_attn.o_proj": (C, C), "mlp.gate_proj": (wide, C), "mlp.up_proj": (wide, C),
             "mlp.down_proj": (C, wide)}
    shapes = {f"model.layers.{i}.{name}.weight": size for name, size in sizes.items()
              for i in range(shape["num_hidden_layers"])}
    shapes |= {"model.embed_tokens.weight": (shape["vocab_size"], C), "model.norm.weight": (C,)}
    if not shape["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (shape["vocab_size"], C)
    rng, state = np.random.RandomState(seed), {}
    for name in sorted(shapes):
        n = torch.from_numpy(rng.standard_normal(shapes[name]).astype(np.float32))
        state[name] = 1 + 0.1 * n if "norm" in name else 0.2 * n
    return state


def tiny_llama(**changed):
    """A random Llama of 2 layers, for tests that need no special weights; evaluation mode."""
    shape = dict(block_size=96, vocab_size=67, n_layer=2, n_head=4, n_kv_head=2, n_embd=32,
                 n_hidden=48, rope_base=10000.0)
    torch.manual_seed(0)
    return Llama(LlamaConfig(**shape | changed)).eval()


# ---------------------------------------------------------------- Hugging Face


def write_safetensors(path, state, **changed):
    """A safetensors file of a state dict; changed: entries of the header."""
    header, data = {"__metadata__": {"format": "pt"}}, b""
    for name, value in state.items():
        content = value.contiguous().view(torch.uint8).numpy().tobytes()
        header[name] = dict(dtype=DTYPES[value.dtype], shape=list(value.shape),
                            data_offsets=[len(data), len(data) + len(content)])
        data += content
    text = json.dumps(header | changed).encode()
    Path(path).write_bytes(len(text).to_bytes(8, "little") + text + data)


def write_folder(folder, dtype=torch.float32, vocabulary=300, state=None, **changed):
    """A folder as Hugging Face has it: config.json, model.safetensors, tokenizer.json of all bytes,
    two merges and ChatML's marks. changed: fields of config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    shape = SHAPE | dict(vocab_size=vocabulary, max_position_embeddings=1024)
    sizes = {name: value for name, value in changed.items() if name in shape}
    if state is None:
        state = weights(**shape | sizes)
    write_safetensors(folder / "model.safetensors",
                      {name: value.to(dtype) for name, value in state.items()})
    config = shape | dict(model_type="llama", architectures=["LlamaForCausalLM"],
                          hidden_act="silu", eos_token_id=1, torch_dtype="bfloat16")
    (folder / "config.json").write_text(json.dumps(config | changed))
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer_json()))
    return folder


def tokenizer_json(**changed):
    """A tokenizer.json as SmolLM's: <|im_start|>, <|im_end|>, 256 bytes, then two merges."""
    tokens = ["<|im_start|>", "<|im_end|>", *(OF_BYTE[b] for b in range(256)), "<<", "th"]
    special = [dict(id=i, content=tokens[i], special=True) for i in range(2)]
    parts = [dict(type="Digits", individual_digits=True),
             dict(type="ByteLevel", add_prefix_space=False, use_regex=True)]
    return dict(added_tokens=special, normalizer=None, post_processor=None,
                pre_tokenizer=dict(type="Sequence", pretokenizers=parts),
                model=dict(type="BPE", vocab={t: i for i, t in enumerate(tokens)},
                           merges=["< <", ["t", "h"]], unk_token=None)) | changed


# ---------------------------------------------------------------- GGUF


GGUF_NAMES = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
              "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
              "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
              "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down"}


def permuted(w, heads):
    """Rows of q or k in GGUF's order: row i of the two halves of a head next to each other."""
    D = w.size(0) // heads
    order = [h * D + half * D // 2 + i for h in range(heads) for i in range(D // 2)
             for half in (0, 1)]
    return w[order]


def write_gguf(path, state, kind=0, block=None, **changed):
    """A GGUF file of a state dict of Hugging Face. kind: the number of the matrices' type; block:
    what makes bytes of a matrix (default: float32). changed: metadata, "." as "__"."""
    shape, found = SHAPE, []
    for name, w in state.items():
        short = name.removesuffix(".weight").split(".", 3)
        if "layers" in short:
            new = f"blk.{short[2]}.{GGUF_NAMES[short[3]]}.weight"
            if new.endswith(("attn_q.weight", "attn_k.weight")):
                of = "num_attention_heads" if "attn_q" in new else "num_key_value_heads"
                w = permuted(w, shape[of])
        else:
            new = {"model.embed_tokens": "token_embd.weight", "model.norm": "output_norm.weight",
                   "lm_head": "output.weight"}[name.removesuffix(".weight")]
        as_block = block is not None and w.dim() == 2
        content = block(w) if as_block else w.float().numpy().tobytes()
        found.append((new, list(w.shape)[::-1], kind if as_block else 0, content))
    tokens = tokenizer_json()["model"]["vocab"]
    n = state["model.embed_tokens.weight"].size(0)
    tokens = [*tokens, *(f"<extra {i}>" for i in range(n - len(tokens)))][:n]
    types = [1 if 2 <= i < 260 else 3 for i in range(n)]
    meta = {"general.architecture": "llama", "llama.block_count": shape["num_hidden_layers"],
            "llama.context_length": 128, "llama.embedding_length": shape["hidden_size"],
            "llama.feed_forward_length": shape["intermediate_size"],
            "llama.attention.head_count": shape["num_attention_heads"],
            "llama.attention.head_count_kv": shape["num_key_value_heads"],
            "llama.rope.freq_base": 10000.0, "llama.attention.layer_norm_rms_epsilon": 1e-5,
            "llama.vocab_size": n, "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "smollm",
            "tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": types,
            "tokenizer.ggml.merges": ["< <", "t h"], "tokenizer.ggml.eos_token_id": 1}
    meta |= {name.replace("__", "."): value for name, value in changed.items()}
    meta = {name: value for name, value in meta.items() if value is not None}
    head = b"GGUF" + struct.pack("<IQQ", 3, len(found), len(meta))
    for name, value in meta.items():
        head += text(name) + written(value)
    data = b""
    for name, size, number, content in found:
        head += text(name)
        head += struct.pack(f"<I{len(size)}QIQ", len(size), *size, number, len(data))
        data += content + bytes(-len(content) % 32)
    Path(path).write_bytes(head + bytes(-len(head) % 32) + data)


def text(value):
    return struct.pack("<Q", len(value.encode())) + value.encode()


def written(value):
    """A value of the metadata: its type and its bytes."""
    if isinstance(value, str):
        kind, content = 8, text(value)
    elif isinstance(value, list):
        items = [written(item) for item in value]
        kind, content = 9, items[0][:4] + struct.pack("<Q", len(items))
        content += b"".join(item[4:] for item in items)
    elif isinstance(value, float):
        kind, content = 6, struct.pack("<f", value)
    else:
        kind, content = 4, struct.pack("<I", value)
    return struct.pack("<I", kind) + content
