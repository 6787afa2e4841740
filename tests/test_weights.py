"""Files of weights: what is read, what is refused by name, whatever a file is called."""

import json
import math
import shutil
import subprocess
import zipfile

import pytest
import tiktoken
import torch
import torch.nn as nn

import codi
import probe
import probe_soft
import soft_thinking
import test_codi
import test_runs
from common.runtime import UserError
from common.text import Tokenizer
from common.weights import (COMPUTED, load_checkpoint, open_weights, plain_names, pretrained,
                            read)
from gpt2 import GPT2, GPT2Config
from test_runs import check_refusal, metrics, run, same, start
from tiny import tiny_model, weights

IDS = torch.arange(24).view(2, 12)


def logits(model):
    """(2, 12, V)"""
    return model.eval().head(model(IDS))


@pytest.fixture
def saved(tmp_path):
    """A pytorch_model.bin of the tiny model, and the config.json next to it, to be changed."""
    path = tmp_path / "pytorch_model.bin"
    torch.save(weights(), path)
    change_config(path)
    return path


def change_config(path, **changed):
    """Write a config.json as Hugging Face does next to the file."""
    config = dict(model_type="gpt2", architectures=["GPT2LMHeadModel"], n_head=4, n_layer=3,
                  n_embd=32, vocab_size=67, n_positions=96, activation_function="gelu_new")
    (path.parent / "config.json").write_text(json.dumps(config | changed))


def change_weights(path, change):
    """Change the state dict in a file."""
    state = torch.load(path, weights_only=True)
    change(state)
    torch.save(state, path)


# ---------------------------------------------------------------- mathematics


@pytest.mark.parametrize("changed", [
    {}, dict(activation_function="gelu_pytorch_tanh"), dict(activation_function="gelu_fast"),
    dict(layer_norm_epsilon=1e-05), dict(n_inner=None), dict(n_inner=128),
    dict(reorder_and_upcast_attn=True), dict(scale_attn_weights=True, attn_pdrop=0.3),
    dict(tie_word_embeddings=True), dict(architectures=["GPT2Model"]), dict(n_ctx=1024),
    dict(summary_type="mean", torch_dtype="float16", foo={"bar": [1]})])
def test_fields_without_effect_are_ignored(saved, changed):
    change_config(saved, **changed)
    assert torch.equal(logits(pretrained(saved)), logits(tiny_model()))


@pytest.mark.parametrize("changed", [
    dict(activation_function="relu"), dict(activation_function="gelu"),
    dict(activation_function=None), dict(layer_norm_epsilon=1e-6), dict(scale_attn_weights=False),
    dict(scale_attn_by_inverse_layer_idx=True), dict(n_inner=64), dict(tie_word_embeddings=False),
    dict(add_cross_attention=True), dict(is_encoder_decoder=True), dict(model_type="gpt_neo"),
    dict(architectures=["GPTNeoForCausalLM"]), dict(architectures=["GPT2ForTokenClassification"]),
    dict(pruned_heads={"0": [1]}), dict(quantization_config={"bits": 8}),
    dict(auto_map={"AutoModel": "own.Model"}), dict(n_layer=2), dict(n_embd=64),
    dict(vocab_size=68), dict(n_positions=64), dict(num_hidden_layers=2), dict(n_head=5),
    dict(n_head=0), dict(n_head="4"), dict(n_head=None), dict(num_attention_heads=3)])
def test_fields_with_effect_are_refused_by_name(saved, changed):
    change_config(saved, **changed)
    name = next(iter(changed)).replace("num_attention_heads", "heads")
    with pytest.raises(UserError, match=name):
        pretrained(saved)


@pytest.mark.parametrize("content", ["", "{", "[1]", '"gpt2"', "\udc80"])
def test_a_config_that_is_none(saved, content):
    (saved.parent / "config.json").write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(UserError, match="config.json: not a JSON object"):
        pretrained(saved)


def test_heads(saved, capsys):
    """n_head is config.json's, under either name and with a BOM; 12 if it does not say, as in
    Hugging Face; without a config.json heads have 64 channels, and that is said."""
    where = saved.parent / "config.json"
    where.write_text("\ufeff" + '{"n_head": 4}', encoding="utf-8")
    assert torch.equal(logits(pretrained(saved)), logits(tiny_model()))
    where.write_text('{"num_attention_heads": 4}')
    assert torch.equal(logits(pretrained(saved)), logits(tiny_model()))
    where.write_text("{}")
    with pytest.raises(UserError, match="32 channels are not a multiple of 12 heads"):
        pretrained(saved)
    torch.save(weights(n_embd=192, n_layer=1), saved)
    assert pretrained(saved).config.n_head == 12 and capsys.readouterr().out == ""
    where.unlink()
    assert pretrained(saved).config.n_head == 3 and "n_head 3" in capsys.readouterr().out


def test_every_field_is_tried():
    """Each field of COMPUTED is among those refused above."""
    changed = test_fields_with_effect_are_refused_by_name.pytestmark[0].args[1]
    assert set(COMPUTED) <= {name for one in changed for name in one}


def test_the_head_is_tied(saved):
    """lm_head.weight is the token embedding, in whatever precision, or is refused."""
    def tied(state):
        state["lm_head.weight"] = state["transformer.wte.weight"].clone()

    def untied(state):
        state["lm_head.weight"][5, 3] += 1e-3

    change_weights(saved, tied)
    assert torch.equal(logits(pretrained(saved)), logits(tiny_model()))
    change_weights(saved, untied)
    with pytest.raises(UserError, match="lm_head.weight is not equal to wte.weight"):
        pretrained(saved)
    change_weights(saved, lambda s: s.update({"lm_head.weight": torch.zeros(64, 32)}))
    with pytest.raises(UserError, match="lm_head.weight is not equal to wte.weight"):
        pretrained(saved)


@pytest.mark.parametrize("value", [torch.ones(32, dtype=torch.int8), [1.0], "x", None,
                                   torch.ones(32, device="meta"), torch.ones(32).to_sparse()],
                         ids=["int8", "list", "text", "none", "meta", "sparse"])
def test_weights_of_another_kind(saved, value):
    """Quantized ones, say: to copy their numbers would compute something else."""
    change_weights(saved, lambda s: s.update({"transformer.ln_f.weight": value}))
    with pytest.raises(UserError, match="ln_f.weight is not a plain tensor"):
        pretrained(saved)


# ---------------------------------------------------------------- names of weights


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.",
                                    "_orig_mod.module.transformer."])
def test_prefixes_of_wrappers(saved, prefix):
    state = {prefix + name.removeprefix("transformer."): w for name, w in weights().items()}
    torch.save(state | {prefix.replace("transformer.", "") + "lm_head.weight":
                        state[prefix + "wte.weight"]}, saved)
    assert torch.equal(logits(pretrained(saved)), logits(tiny_model()))


def test_a_weight_twice(saved):
    change_weights(saved, lambda s: s.update({"module.wte.weight": torch.zeros(67, 32)}))
    with pytest.raises(UserError, match="the weight wte.weight twice"):
        pretrained(saved)


def test_wrapped_model():
    """What the wrappers themselves name: torch.compile of a model and of one of its blocks."""
    model = tiny_model()
    names = list(model.state_dict())
    model.h[1] = torch.compile(model.h[1])
    whole = nn.DataParallel(torch.compile(model))
    assert list(whole.state_dict()) != names
    assert list(plain_names(whole.state_dict(), "w")) == names


# ---------------------------------------------------------------- files that are no weights


class Rogue:
    """An object whose unpickling would run code."""

    def __reduce__(self):
        return subprocess.call, (["touch", "/nowhere/rogue"],)


def files(folder):
    """{name: (path, words of the sentence)} of files that people have at hand."""
    state, made = weights(), {}

    def written(name, content, *words):
        path = folder / name
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            torch.save(content, path)
        made[name] = path, words

    written("empty.bin", b"", "empty")
    written("noise.bin", bytes(range(256)) * 9, "cut off or damaged")
    written("pointer.bin", b"version https://git-lfs.github.com/spec/v1\noid sha256:1", "git lfs")
    written("page.bin", b"\n<!doctype html><html></html>", "web page")
    written("index.json", b'{"metadata": {}, "weight_map": {"wte.weight": "a.bin"}}', "shards",
            "from_pretrained")
    written("config.json", b'{"n_head": 4}', "JSON")
    written("w.gguf", b"GGUF" + bytes(90), "GGUF")
    written("tf_model.h5", b"\x89HDF\r\n" + bytes(90), "TensorFlow")
    header = b'{"wte.weight":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
    written("w.bin", len(header).to_bytes(8, "little") + header + bytes(4), "not a matrix")
    half = dict(list(state.items())[:len(state) // 2])
    written("pytorch_model-00001-of-00002.bin", half, "shards", "from_pretrained")
    written("model.pt", tiny_model(), "gpt2.GPT2", "state_dict()")
    written("rogue.pt", Rogue(), "Python objects", "call")
    optimizer = torch.optim.AdamW(tiny_model().parameters())
    written("optimizer.pt", optimizer.state_dict(), "optimizer", "no weights")
    written("nested.pt", dict(model=state, step=3), "'model'", "torch.save")
    written("list.pt", [1, 2], "list")
    written("tensor.pt", torch.ones(3), "Tensor")
    written("nothing.pt", {}, "nothing")
    written("llama.pt", {"model.embed_tokens.weight": torch.ones(3)}, "model.embed_tokens.weight")
    shutil.make_archive(str(folder / "archive"), "zip", folder, "config.json")
    made["archive.zip"] = folder / "archive.zip", ("zip archive",)
    with zipfile.ZipFile(folder / "script.pt", "w") as program:     # as torch.jit.save writes it
        for name in ("data.pkl", "constants.pkl", "code/__torch__.py"):
            program.writestr(f"script/{name}", b"")
    made["script.pt"] = folder / "script.pt", ("TorchScript", "state_dict()")
    made["folder"] = folder, ("a folder",)
    return made


def test_files_at_hand(tmp_path, capsys, gpt2_tokenizer):
    """Each is refused with what it is, never with torch's text, and nothing in it is run."""
    for name, (path, words) in files(tmp_path).items():
        with pytest.raises(UserError) as error:
            pretrained(path)
        sentence = str(error.value)
        assert sentence.startswith(str(path)) and all(word in sentence for word in words), sentence
        with pytest.raises(UserError) as error:
            load_checkpoint(path)
        assert str(path) in str(error.value)
        for text in (sentence, str(error.value)):
            assert "weights_only" not in text and "\n" not in text and "Unpickl" not in text


@pytest.mark.parametrize("old", [False, True], ids=["zip", "old-format"])
def test_cut_off_anywhere(tmp_path, old):
    """A file that a broken download left, cut at any place, is said to be so."""
    whole, part = tmp_path / "whole.bin", tmp_path / "part.bin"
    torch.save(weights(n_layer=1, n_embd=8, n_head=1, vocab_size=9, n_positions=9), whole,
               _use_new_zipfile_serialization=not old)
    content = whole.read_bytes()
    for end in range(1, len(content), max(1, len(content) // 150)):
        part.write_bytes(content[:end])
        with pytest.raises(UserError, match="cut off or damaged"):
            read(part)
    assert pretrained(whole, n_head=1).config.n_layer == 1


def test_weights_at_hand_without_their_tokenizer(tmp_path, monkeypatch):
    """The sentence is about the tokenizer, not about the file."""
    def fail(name):
        raise ConnectionError("no route to host")
    monkeypatch.setattr(tiktoken, "get_encoding", fail)
    torch.save(weights(), tmp_path / "gpt2.bin")
    with pytest.raises(UserError, match="^tiktoken cannot download the gpt2 tokenizer"):
        open_weights("--init", str(tmp_path / "gpt2.bin"))


def test_one_shard_only(tmp_path):
    """A model of one file may have a name like that of a shard."""
    path = tmp_path / "pytorch_model-00001-of-00001.bin"
    torch.save(weights(), path)
    assert torch.equal(logits(pretrained(path, n_head=4)), logits(tiny_model()))


def test_a_damaged_download(tmp_path, monkeypatch, capsys, data, gpt2_tokenizer):
    """What torch.hub has kept of a preset is named, so that it can be deleted."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    (tmp_path / "hub" / "checkpoints" / "gpt2.bin").write_bytes(b"PK\3\4" + bytes(99))
    argv = start(data, tmp_path / "run", "--init gpt2")
    check_refusal(argv, capsys, "--init", tmp_path / "hub" / "checkpoints" / "gpt2.bin", "damaged")


# ---------------------------------------------------------------- dispatch by content


def test_a_checkpoint_of_any_name(finished, data, tmp_path, capsys):
    """--init, --eval-only and probe.py know a checkpoint of this project by its content."""
    for name in ("pytorch_model.bin", "model", "w.safetensors"):
        path = tmp_path / name
        shutil.copy(finished["mixing"] / "last.pt", path)
        more = (f"--init {path} --lr 1e-30 --weight-decay 0 --overwrite --steps-stage-0 1 "
                "--steps-per-stage 1 --steps-last 1")
        assert run(start(data, tmp_path / "run", more)) == 0
        assert same(load_checkpoint(tmp_path / "run" / "last.pt")["model"],
                    load_checkpoint(path)["model"])
        assert run(["--eval-only", path]) == 0
        probe.main([str(path), "--n", "4", "--out", str(tmp_path)])
    assert (tmp_path / "probe.json").exists()


def test_a_codi_checkpoint_of_any_name(codi_run, data, tmp_path, capsys):
    """So do codi.py's --init, --teacher and --eval-only, and soft_thinking.py --model."""
    path = tmp_path / "teacher.bin"
    shutil.copy(codi_run / "best.pt", path)
    assert test_codi.run(test_codi.start(data, tmp_path / "a", f"--init {path}")) == 0
    assert test_codi.run(test_codi.start(data, tmp_path / "b", f"--teacher {path}")) == 0
    assert test_codi.run(["--eval-only", path]) == 0
    argv = ["--model", path, "--data", data, "--mode", "greedy", "--n", "4", "--max-think", "12",
            "--max-new", "8", "--out", tmp_path / "soft"]
    assert not soft_thinking.main(probe_soft, list(map(str, argv)))


@pytest.mark.parametrize("name", ["gpt2.pt", "weights"])
def test_released_weights_of_any_name(data, tmp_path, capsys, gpt2_tokenizer, name):
    """A state dict of Hugging Face is one under any name; where a checkpoint is needed, the
    sentence says what it is."""
    path = tmp_path / name
    torch.save(weights(vocab_size=258, n_positions=800, n_layer=1), path)
    (tmp_path / "config.json").write_text('{"n_head": 4}')
    assert run(start(data, tmp_path / "run", f"--init {path}")) == 0
    assert load_checkpoint(tmp_path / "run" / "last.pt")["config"]["n_head"] == 4
    argv = ["--model", path, "--data", data, "--mode", "greedy", "--n", "4", "--max-think", "12",
            "--max-new", "8", "--out", tmp_path / "soft"]
    assert not soft_thinking.main(probe_soft, list(map(str, argv)))
    check_refusal(["--eval-only", path], capsys, path, "weights of a GPT-2", "--init")


def test_a_wrapped_checkpoint(codi_run, tmp_path):
    """Prefixes of wrappers go from the names in a checkpoint of this project, too."""
    state = torch.load(codi_run / "best.pt", weights_only=True)
    wrapped = {part: {f"_orig_mod.module.{name}": w for name, w in state[part].items()}
               for part in ("model", "projection")}
    torch.save(state | wrapped, tmp_path / "wrapped.pt")
    ours, theirs = (codi.trained_model(path, {}) for path in (codi_run / "best.pt",
                                                              tmp_path / "wrapped.pt"))
    assert same(ours.model.state_dict(), theirs.model.state_dict())
    assert same(ours.projection.state_dict(), theirs.projection.state_dict())


@pytest.mark.parametrize("change, word", [
    (lambda s: s["config"].update(rope=True), "rope"),
    (lambda s: s["config"].update(n_layer=3), "h.1.ln_1.weight"),
    (lambda s: s["config"].update(n_head=3), "n_head 3"),
    (lambda s: s["config"].pop("n_embd"), "wte.weight"),
    (lambda s: s["model"].pop("ln_f.bias"), "ln_f.bias"),
    (lambda s: s["model"].update(extra=torch.ones(2)), "extra"),
    (lambda s: s["model"].update(extra=1), "extra"),
    (lambda s: s["tokenizer"].pop("pieces"), "cannot use"),
    (lambda s: s.update(tokenizer=3), "tokenizer is a int"),
    (lambda s: s.update(model=[1]), "model is a list")],
    ids=["field", "layers", "heads", "width", "missing", "extra", "number", "pieces", "tokenizer",
         "list"])
def test_a_changed_checkpoint(finished, data, tmp_path, capsys, change, word):
    """A field that this version does not know, or parts that do not go together: one sentence."""
    path = tmp_path / "c.pt"
    shutil.copy(finished["mixing"] / "last.pt", path)
    change_weights(path, change)
    check_refusal(["--eval-only", path], capsys, path, word)
    check_refusal(start(data, tmp_path / "run", f"--init {path}"), capsys, "--init", path, word)


# ---------------------------------------------------------------- flags without effect


SHAPES = ["--n-layer 2", "--n-head 8", "--n-embd 128", "--block-size 4096", "--embd-std 0.02",
          "--pos-std 0.02", "--state-std 1", "--tokenizer gpt2"]


@pytest.mark.parametrize("script", [test_runs, test_codi], ids=["coconut", "codi"])
@pytest.mark.parametrize("flag", SHAPES)
@pytest.mark.parametrize("init", ["gpt2", "some.pt"])
def test_a_shape_next_to_init(data, tmp_path, capsys, script, flag, init):
    """Weights have their own shape: to type another is refused, even if it is the default."""
    argv = script.start(data, tmp_path / "run", f"--init {init} {flag}")
    assert script.run(argv) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert flag.split()[0] in last and f"--init {init}" in last
    assert not (tmp_path / "run").exists()


def test_a_recipe_may_set_what_weights_bring(data, tmp_path):
    """The paper's recipe has a block_size next to init=gpt2; typed, it is refused unless the model
    is from scratch."""
    flags, _ = codi.parse_flags(["--recipe", "gsm8k"])
    assert (flags.init, flags.block_size) == ("gpt2", 1024)
    flags, _ = codi.parse_flags("--recipe gsm8k --init scratch --block-size 512".split())
    assert (flags.init, flags.block_size) == ("scratch", 512)
    with pytest.raises(SystemExit):
        codi.parse_flags("--recipe gsm8k --block-size 512".split())


def test_settings_say_what_weights_brought(finished, data, tmp_path, capsys):
    """A run's printed and saved settings are those of the model that --init gave."""
    more = f"--init {finished['mixing'] / 'last.pt'}"
    assert run(start(data, tmp_path / "run", more)) == 0
    flags = load_checkpoint(tmp_path / "run" / "last.pt")["flags"]
    own = load_checkpoint(finished["mixing"] / "last.pt")["flags"]
    for name in ("n_layer", "n_head", "n_embd", "block_size", "embd_std", "state_std", "tokenizer"):
        assert flags[name] == own[name]
    assert "n_embd=16" in capsys.readouterr().out
    assert run(["--resume", "--out", tmp_path / "run"]) == 0


def test_a_table_from_weights_goes_on(finished, data, tmp_path):
    """What --init brings does not differ from what was asked when --table is started again."""
    more = (f"--init {finished['mixing'] / 'last.pt'} --table --methods cot --seeds 1 "
            "--steps-stage-0 1 --steps-per-stage 1 --steps-last 2")
    for _ in range(2):
        assert run(start(data, tmp_path / "table", more)) == 0


@pytest.mark.parametrize("flag", ["--lr 0.5", "--c 2", "--batch-size 8", "--method cot", "--seed 7",
                                  "--steps-last 9", "--n-layer 3", "--resume", "--overwrite",
                                  "--out elsewhere", "--init gpt2", "--save-every 9"])
def test_eval_only_refuses_what_trains(finished, capsys, flag):
    """A model that is trained already has its settings: others, typed, are named."""
    path = finished["mixing"] / "best.pt"
    check_refusal(["--eval-only", path, *flag.split()], capsys, flag.split()[0], path, "leave it")


def test_eval_only_may_repeat_what_trained(data, finished, capsys):
    """The command of the run with --eval-only added is accepted."""
    out = finished["mixing"]
    argv = [*start(data, out, test_runs.VARIANTS["mixing"]), "--eval-only", out / "best.pt"]
    assert run(argv) == 0


@pytest.mark.parametrize("argv, words", [
    ("--lora-alpha 8", ("--lora-alpha", "--lora-r")), ("--lora-dropout 0", ("--lora-dropout",)),
    ("--resume --overwrite", ("--resume", "--overwrite"))])
def test_flags_without_effect_in_codi(argv, words, capsys):
    with pytest.raises(SystemExit) as stop:
        codi.parse_flags(argv.split())
    last = capsys.readouterr().err.splitlines()[-1]
    assert stop.value.code == 2 and all(word in last for word in words)


def test_stage_mix_without_mixing(data, tmp_path, capsys):
    argv = start(data, tmp_path / "run", "--uniform-prob 0 --stage-mix linear")
    assert run(argv) == 2
    assert "--uniform-prob is 0" in capsys.readouterr().err.splitlines()[-1]


def test_advice_that_works(finished, data, tmp_path, capsys):
    """Of a question that is too long, --block-size is advised only where it has an effect."""
    splits = {name: json.loads((data / f"{name}.json").read_text())
              for name in ("train", "valid", "test")}
    splits["test"][0]["question"] += " pens" * 200
    folder = tmp_path / "long"
    folder.mkdir()
    for name, items in splits.items():
        (folder / f"{name}.json").write_text(json.dumps(items))
    last, out = finished["mixing"] / "last.pt", tmp_path / "run"
    check_refusal(start(folder, out), capsys, "block_size 128; raise --block-size or")
    assert run(start(folder, out, "--block-size 512 --overwrite")) == 0
    for argv in (start(folder, tmp_path / "b", f"--init {last}"),
                 ["--eval-only", last, "--data", folder],
                 ["--eval-only", last, "--ask", "pens " * 300]):
        capsys.readouterr()
        assert run(argv) == 2
        said = capsys.readouterr().err.splitlines()[-1]
        assert "block_size 128; " in said and "--block-size" not in said


def test_metrics_without_a_checkpoint(data, tmp_path, capsys):
    """--resume is advised only where there is something to go on from."""
    out = tmp_path / "run"
    out.mkdir()
    (out / "metrics.jsonl").write_text("")
    assert run(start(data, out)) == 2
    said = capsys.readouterr().err
    assert "--overwrite" in said and "--resume" not in said
    assert run(start(data, out, "--overwrite")) == 0 and metrics(out)


@pytest.mark.parametrize("part", ["model", "projection"])
def test_a_checkpoint_that_is_not_finite_is_refused(tmp_path, part):
    """Where it is read, so for every flag that names a file of weights."""
    tok = Tokenizer.compact(["one two"])
    model = GPT2(GPT2Config(16, tok.n_vocab, 1, 1, 8))
    state = dict(config=vars(model.config), model=model.state_dict(), tokenizer=tok.state(),
                 flags=dict(method="codi"), projection={"1.bias": torch.zeros(8)})
    name = "1.bias" if part == "projection" else "ln_f.bias"
    bad = state[part] | {name: torch.full((8,), math.nan)}
    torch.save(state | {part: bad}, tmp_path / "bad.pt")
    with pytest.raises(UserError, match="bad.pt.*bias has values that are not finite"):
        open_weights("--init", str(tmp_path / "bad.pt"))
