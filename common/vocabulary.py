"""Tokenizers of released models: from a tokenizer.json of Hugging Face, or from a GGUF file.

Read are byte-level BPEs, where a piece is a string of bytes and pieces are merged in the order of
their ids: GPT-2's, LLaMA 3's, SmolLM's. Others (SentencePiece, say) are refused by name.

A byte is written as a printable character, as in GPT-2: "\\u0120the" is " the". How text is split
before any merge is a regular expression, which tiktoken reads as it is.
"""

import json
import os
import re

from common.formats import read_json
from common.runtime import UserError
from common.text import Tokenizer

# GPT-2's split (its pattern in openai/gpt-2, encoder.py). SmolLM first sets each digit apart, so
# the spaces before a digit end where a text does
GPT2 = (r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")
DIGITS_APART = (r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|"
                r"\s+(?![^\s\p{N}])|\s+")
LLAMA3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
          r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
OF_GGUF = {"gpt-2": GPT2, "smollm": DIGITS_APART, "llama-bpe": LLAMA3}
CHAT = ("<|im_start|>", "<|im_end|>")                    # the marks of ChatML
CONTROL, NORMAL = 3, 1                                   # types of tokens in GGUF


def byte_of_character():
    """{character: byte}: printable bytes stand for themselves, others for U+0100 and on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    found = {chr(byte): byte for byte in printable}
    others = [byte for byte in range(256) if byte not in printable]
    return found | {chr(256 + i): byte for i, byte in enumerate(others)}


BYTES = byte_of_character()


def piece(token, where):
    """The bytes of a token. Raises UserError if it is not written as bytes are."""
    try:
        return bytes(BYTES[character] for character in token)
    except KeyError:
        raise UserError(f"{where}: the token {token!r} is not one of a byte-level BPE; only those "
                        "are read here.") from None


def check_order(ids, merges, where):
    """Raises UserError unless merges, a list of (left, right), make tokens {token: id} in the order
    of their ids: tiktoken merges in that order."""
    made = [ids.get(left + right) for left, right in merges]
    if None in made or any(a > b for a, b in zip(made, made[1:])):
        raise UserError(f"{where}: its merges are not in the order of its tokens' ids; such a "
                        "tokenizer is not read here.")


def checked(tok, size, where):
    """The Tokenizer of a model of `size` embeddings. Raises UserError if it has more tokens."""
    most = max([*tok.ranks.values(), *tok.released["special"].values()])
    if most >= size:
        raise UserError(f"{where}: has a token of id {most}, but the model has only {size:,} "
                        "embeddings; take the tokenizer of this model.")
    return tok


# ---------------------------------------------------------------- Hugging Face


def of_folder(folder, config, size):
    """The Tokenizer of the tokenizer.json in a folder. config: the config.json there; size: how
    many embeddings the model has. Raises UserError."""
    where = os.path.join(folder, "tokenizer.json")
    if not os.path.exists(where):
        raise UserError(f"{where}: no such file; it belongs to the weights next to it: copy or "
                        "download it, too.")
    content, more = read_json(where), {}
    if os.path.exists(os.path.join(folder, "tokenizer_config.json")):
        more = read_json(os.path.join(folder, "tokenizer_config.json"))
    try:
        return checked(of_json(content, config, more, size, where), size, where)
    except (KeyError, TypeError, AttributeError, ValueError, IndexError) as error:
        raise UserError(f"{where}: not a tokenizer.json as Hugging Face writes it "
                        f"({type(error).__name__}: {error}).") from None


def of_json(content, config, more, size, where):
    """of_folder, of a tokenizer.json, config.json and tokenizer_config.json (or {})."""
    model = content["model"]
    computed = {"type": ("BPE",), "dropout": (None,), "unk_token": (None, ""),
                "continuing_subword_prefix": (None, ""), "end_of_word_suffix": (None, ""),
                "byte_fallback": (False, None)}
    for name, same in computed.items():
        if model.get(name, same[0]) not in same:
            raise UserError(f"{where}: model.{name} is {json.dumps(model[name])}, but only "
                            f"byte-level BPEs with {json.dumps(same[0])} are read here.")
    if content.get("normalizer"):
        raise UserError(f"{where}: has a normalizer ({content['normalizer'].get('type')}), which "
                        "is not read here.")
    pattern = pattern_of(content["pre_tokenizer"], where)
    merges = [m.split(" ") if isinstance(m, str) else m for m in model["merges"]]
    check_order(model["vocab"], merges, where)
    special = {token["content"]: token["id"] for token in content.get("added_tokens") or ()}
    reached = {left + right for left, right in merges} | set(BYTES)
    if model.get("ignore_merges"):
        reached = model["vocab"]
    ranks = {piece(token, where): i for token, i in model["vocab"].items()
             if token in reached and token not in special}
    ends = more.get("eos_token")
    ends = ends.get("content") if isinstance(ends, dict) else ends
    eos = config.get("eos_token_id")
    eos = special.get(ends, eos[0] if isinstance(eos, list) else eos)
    if type(eos) is not int:
        raise UserError(f"{where}: neither tokenizer_config.json nor config.json says which token "
                        "ends a text (eos_token_id).")
    template = more.get("chat_template")
    bos = first_tokens(content.get("post_processor"), special)
    return Tokenizer(pattern, ranks, dict(special=special, eos=eos, bos=bos, size=size,
                                          template=template_of(template, special)))


def pattern_of(pre, where):
    """The regular expression of a tokenizer.json's pre_tokenizer. Raises UserError on others than
    GPT-2's, SmolLM's and those that a regular expression splits, as LLaMA 3's."""
    parts = pre["pretokenizers"] if pre["type"] == "Sequence" else [pre]
    kinds, last = [part["type"] for part in parts], parts[-1]
    byte_level = last["type"] == "ByteLevel" and not last.get("add_prefix_space", True)
    if byte_level and last.get("use_regex", True):
        if kinds == ["ByteLevel"]:
            return GPT2
        if kinds == ["Digits", "ByteLevel"] and parts[0].get("individual_digits"):
            return DIGITS_APART
    elif byte_level and kinds == ["Split", "ByteLevel"]:
        how = parts[0].get("behavior"), bool(parts[0].get("invert"))
        if how == ("Isolated", False) and "Regex" in parts[0]["pattern"]:
            return parts[0]["pattern"]["Regex"]
    raise UserError(f"{where}: its pre_tokenizer splits text by {', '.join(kinds)} in a way that "
                    "is not read here.")


def first_tokens(post, special):
    """The ids that a tokenizer.json's post_processor puts before every text, a list."""
    for part in [post, *((post or {}).get("processors") or ())]:
        if part and part["type"] == "TemplateProcessing":
            first = part["single"][0]
            if "SpecialToken" in first:
                return [special[first["SpecialToken"]["id"]]]
    return []


# ---------------------------------------------------------------- GGUF


def of_gguf(meta, where):
    """The Tokenizer of the metadata of a GGUF file. Raises UserError."""
    def needed(name, kind):
        value = meta.get(f"tokenizer.ggml.{name}")
        if not isinstance(value, kind):
            raise UserError(f"{where}: has no tokenizer.ggml.{name}, which is needed to read text.")
        return value

    if needed("model", str) != "gpt2":
        raise UserError(f"{where}: tokenizer.ggml.model is {meta['tokenizer.ggml.model']!r}, but "
                        "only byte-level BPEs ('gpt2') are read here.")
    pre = needed("pre", str)
    if pre not in OF_GGUF:
        raise UserError(f"{where}: tokenizer.ggml.pre is {pre!r}; known here are "
                        f"{', '.join(OF_GGUF)}.")
    tokens, types = needed("tokens", list), needed("token_type", list)
    ids = {token: i for i, token in enumerate(tokens)}
    merges = [merge.split(" ", 1) for merge in needed("merges", list)]
    check_order(ids, merges, where)
    special = {token: i for i, token in enumerate(tokens) if types[i] == CONTROL}
    ranks = {piece(token, where): i for i, token in enumerate(tokens) if types[i] == NORMAL}
    add_bos = meta.get("tokenizer.ggml.add_bos_token", pre == "llama-bpe")
    bos = [meta["tokenizer.ggml.bos_token_id"]] if add_bos else []
    released = dict(special=special, eos=needed("eos_token_id", int), bos=bos, size=len(tokens),
                    template=template_of(meta.get("tokenizer.chat_template"), special))
    return Tokenizer(OF_GGUF[pre], ranks, released)


# ---------------------------------------------------------------- chats


def template_of(jinja, special):
    """What is written around a question, "{prompt}" in it, of a model of the ChatML family: its
    template is a Jinja program, of which only the default system text is taken. None of others."""
    if not set(CHAT) <= special.keys():
        return None
    start, end = CHAT
    system = re.search(r"<\|im_start\|>system(?:\n|\\n)([^'\"{}]*)<\|im_end\|>",
                       jinja if isinstance(jinja, str) else "")
    before = f"{start}system\n{system[1]}{end}\n" if system else ""
    return f"{before}{start}user\n{{prompt}}{end}\n{start}assistant\n"
