"""Checkpoints with one damaged value: --eval-only, --init, --resume and --teacher refuse each in
one sentence that names it. (stress.py damages at random; here is one of each kind that it found.)
"""

import argparse
import io
from types import SimpleNamespace

import pytest
import torch

import coconut
import codi
import soft_thinking
import stress
import tiny
from common import evaluation, experiment, runtime, settings, tables
from common.runtime import UserError, count, real
from conftest import ROOT

GONE = object()


def changed(content, path, value):
    """A checkpoint's bytes with another value at a path of keys; GONE: without it."""
    state = torch.load(io.BytesIO(content), weights_only=True)
    holder = state
    for key in path[:-1]:
        holder = holder[key]
    if value is GONE:
        del holder[path[-1]]
    else:
        holder[path[-1]] = value
    f = io.BytesIO()
    torch.save(state, f)
    return f.getvalue()


def used(script, use, name, folder):
    """How a script uses the checkpoint `name` in its folder: a stress.Ended."""
    flags = stress.tiny_flags(script) | {"--out": ["other"]}
    if use == "--init":
        for flag in ("--n-layer", "--n-head", "--n-embd"):
            del flags[flag]
    argv = stress.joined(flags | {use: [name]})
    if use == "--resume":
        argv = ["--resume", "--out", "run"]
    if use == "--eval-only":
        argv = ["--eval-only", name, "--data", "tiny"]
    return stress.in_process(script, argv, folder, 60)


def refused(known, folder, script, use, path, value):
    """The last line of stderr where a damaged checkpoint is refused; else the test fails."""
    stress.fresh(folder)
    (folder / "run").mkdir()
    name = "last.pt" if use == "--resume" else "best.pt"
    content = changed(known[script][name], path, value)
    (folder / "run" / name).write_bytes(content)
    ended = used(script, use, f"run/{name}", folder)
    assert ended.code == 2, (ended.code, ended.error, ended.trace)
    assert stress.wrong(script, ended, folder) is None
    return ended.error.splitlines()[-1]


BOTH = [
    (("flags", "lr"), "fast", "its lr is 'fast'"),
    (("flags", "batch_size"), 0, "its batch_size is 0"),
    (("flags", "seed"), [], "its seed is []"),
    (("flags", "compile"), 1, "its compile is 1"),
    (("flags", "dtype"), "float16", "its dtype is 'float16'"),
    (("flags", "method"), {}, "its method is {}"),
    (("flags", 5), 5, "no named values"),
    (("config", "n_layer"), 10 ** 30, "its n_layer is 1000000000"),
    (("config", "switch"), "no", "its switch is 'no'"),
    (("config", "embd_std"), float("nan"), "its embd_std is nan"),
    (("tokenizer", "pieces", -1), GONE, "its tokenizer has"),
]
OF_RUN = [
    (("at",), GONE, "it has no at"),
    (("at", "done"), GONE, "it has no done"),
    (("at", "done"), torch.zeros(2, 2), "its done is tensor"),
    (("at", "best"), True, "its best is True"),
    (("at", "seconds"), "3", "its seconds is '3'"),
    (("at", "rows"), 5, "the rows of its table"),
    (("at", "rows"), [{}], "has no accuracy|the rows of its table"),
]


@pytest.mark.parametrize("script", ["coconut.py", "codi.py"])
@pytest.mark.parametrize("use", ["--eval-only", "--init", "--resume"])
@pytest.mark.parametrize("path, value, said", BOTH)
def test_settings(known, tmp_path, script, use, path, value, said):
    assert said in refused(known, tmp_path / "here", script, use, path, value)


@pytest.mark.parametrize("script", ["coconut.py", "codi.py"])
@pytest.mark.parametrize("use", ["--eval-only", "--resume"])
@pytest.mark.parametrize("path, value, said", OF_RUN)
def test_place_in_the_run(known, tmp_path, script, use, path, value, said):
    error = refused(known, tmp_path / "here", script, use, path, value)
    assert any(words in error for words in said.split("|"))


WHOLE_ROW = dict(accuracy=0.5, n=8, tokens=3.0, seconds=0.1, seconds_batch_1=0.1, who="student",
                 data="tiny", rationale=4.0)
OF_ONE = [
    ("coconut.py", ("flags", "stage_max"), -1, "its stage_max is -1"),
    ("coconut.py", ("at", "part"), GONE, "it has no part"),
    ("coconut.py", ("at", "part"), 10 ** 30, "its part is"),
    ("coconut.py", ("at", "rows"), None, "the rows of its table"),
    ("coconut.py", ("at", "part"), 0, "the rows of its table"),       # one for each stage done
    ("codi.py", ("flags", "n_latent"), "3", "its n_latent is '3'"),
    ("codi.py", ("flags", "kd"), "l3", "its kd is 'l3'"),
    ("codi.py", ("flags", "prompt"), 3, "its prompt is 3"),
    ("codi.py", ("at", "rows"), [], "the rows of its table"),
    ("codi.py", ("at", "rows"), [WHOLE_ROW | dict(tokens="x")], "its tokens is 'x'"),
    ("codi.py", ("at", "rows"), [WHOLE_ROW | dict(who="me")], "its who is 'me'"),
]


@pytest.mark.parametrize("script, path, value, said", OF_ONE)
def test_of_one_script(known, tmp_path, script, path, value, said):
    assert said in refused(known, tmp_path / "here", script, "--resume", path, value)


@pytest.mark.parametrize("script", ["coconut.py", "codi.py"])
@pytest.mark.parametrize("path, value, said", [
    (("metrics_bytes",), GONE, "it has no metrics_bytes"),
    (("metrics_bytes",), -1, "its metrics_bytes is -1"),
    (("optimizers",), 5, "its optimizers"),
    (("optimizers",), [], "its optimizers")])
def test_what_only_a_resumed_run_needs(known, tmp_path, script, path, value, said):
    assert said in refused(known, tmp_path / "here", script, "--resume", path, value)


@pytest.mark.parametrize("use", ["--eval-only", "--init", "--resume"])
@pytest.mark.parametrize("key, value, said", [
    (("1.weight",), torch.zeros(1, 16, 16), "size mismatch for 1.weight"),
    (("1.weight",), "x", "1.weight"),
    (("1.weight",), torch.full((16, 16), float("nan")), "1.weight has values that are not finite"),
    ((), dict(w=torch.zeros(2)), "key(s) in state_dict")])
def test_projection(known, tmp_path, use, key, value, said):
    error = refused(known, tmp_path / "here", "codi.py", use, ("projection", *key), value)
    assert said in error and "run" in error


@pytest.mark.parametrize("use", ["--eval-only", "--resume"])
@pytest.mark.parametrize("value", [GONE, {}])
def test_a_student_without_its_projection(known, tmp_path, use, value):
    """It would think with a random one."""
    error = refused(known, tmp_path / "here", "codi.py", use, ("projection",), value)
    assert "in state_dict" in error


@pytest.mark.parametrize("path, value, said", BOTH)
def test_teacher(known, tmp_path, path, value, said):
    assert said in refused(known, tmp_path / "here", "codi.py", "--teacher", path, value)


def test_a_run_of_the_other_script(known, tmp_path):
    """--resume names the setting that is not there and who has it."""
    for script, other, name in (("coconut.py", "codi.py", "--stage-max"),
                                ("codi.py", "coconut.py", "--n-latent")):
        folder = tmp_path / script
        stress.fresh(folder)
        (folder / "run").mkdir()
        (folder / "run" / "last.pt").write_bytes(known[other]["last.pt"])
        ended = used(script, "--resume", None, folder)
        assert ended.code == 2 and name in ended.error and other in ended.error


def test_soft_thinking_needs_method_and_data(known, tmp_path):
    flags = SimpleNamespace(device="cpu", dtype="float32")
    for name in ("method", "data"):
        path = tmp_path / f"{name}.pt"
        path.write_bytes(changed(known["codi.py"]["best.pt"], ("flags", name), GONE))
        with pytest.raises(UserError, match=f"it has no {name}"):
            experiment.open_any("--model", path, flags, {})


# ---------------------------------------------------------------- kinds


@pytest.mark.parametrize("kind, good, bad", [
    (count(1, 9), (1, 9), (0, 10, -1, True, 2.0, "2", None, [], float("nan"), torch.ones(1))),
    (real(0, 1), (0, 1, 0.5, 1e-320), (-1, 1.1, float("nan"), float("inf"), True, "0.5", None)),
    (real(high=float("inf")), (0.0, 1e308), (-1.0, float("nan"))),
    (str, ("", "x", " 5"), (5, None, True, b"x", ["x"])),
    (bool, (True, False), (0, 1, "True", None)),
    (settings.SWITCH, (True, False), (1, "switch", None)),
    (("a", "b"), ("a",), ("c", "", None, [], {}, 1)),
    (dict(a="what a means"), ("a",), ("what a means", [], 0))])
def test_fits(kind, good, bad):
    assert all(settings.fits(value, kind) for value in good)
    assert [value for value in bad if settings.fits(value, kind)] == []


@pytest.mark.parametrize("module", [coconut, codi])
def test_defaults_and_recipes_fit(module):
    """What a run begins with can be read again from its checkpoint."""
    kinds = settings.kinds(module.SETTINGS)
    for values in (module.DEFAULTS, *module.RECIPES.values()):
        assert [name for name, value in values.items()
                if value is not None and name in kinds
                and not settings.fits(value, kinds[name])] == []


def test_what_was_not_given_is_none_in_checkpoints_of_former_versions():
    settings.check_flags(dict(epochs_last=None, max_new=None, c=1), coconut.SETTINGS, "best.pt")
    with pytest.raises(UserError, match="best.pt.*its c is None"):
        settings.check_flags(dict(epochs_last=None, c=None), coconut.SETTINGS, "best.pt")


def test_a_count_has_an_upper_limit():
    assert count(0)("1000000000") == 10 ** 9
    with pytest.raises(argparse.ArgumentTypeError, match="larger than 1,000,000,000"):
        count(0)("1000000001")


# ---------------------------------------------------------------- sizes


def too_large():
    torch.empty(10 ** 9, 10 ** 6)


@pytest.mark.parametrize("error", [
    MemoryError(), torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB"), None])
def test_too_little_memory_is_one_sentence(capsys, monkeypatch, error):
    def main():
        if error is None:
            too_large()
        raise error
    monkeypatch.setattr("sys.argv", [str(ROOT / "codi.py")])
    with pytest.raises(SystemExit) as stop:
        runtime.run_main(main)
    said = capsys.readouterr().err
    assert stop.value.code == 2 and said.startswith("codi.py: not enough memory (")
    assert len(said.splitlines()) == 1 and "--batch-size" in said


def test_other_runtime_errors_are_not_hidden():
    def main():
        raise RuntimeError("an illegal memory access")
    with pytest.raises(RuntimeError):
        runtime.run_main(main)


def test_more_parts_than_rows():
    """--accumulate beyond the batch: a row a part, at no cost of memory."""
    assert runtime.Machine("cpu", "float32").share([3, 4, 5], 10 ** 9) == [[3], [4], [5]]


def test_a_cache_is_no_longer_than_the_model_reads():
    model = tiny.tiny_model()
    s = tiny.setup_of(model, None, runtime.Machine("cpu", "float32"), tiny.decoding(10 ** 9))
    batch = SimpleNamespace(prompt=torch.zeros(2, 5), latent=torch.zeros(2, 3))
    cache = evaluation.new_cache(s, batch)
    assert cache.keep.shape == (2, 5 + 3 + 1 + model.config.block_size)


def test_a_student_that_says_nothing(capsys):
    """No thoughts, no tokens: how many times more the teacher has cannot be said."""
    rows = [WHOLE_ROW | dict(tokens=0.0), WHOLE_ROW | dict(who="teacher")]
    tables.print_sides(rows, SimpleNamespace(n_latent=0, method="codi", data="tiny", seed=0))
    assert "tokens nanx" in capsys.readouterr().out


# ---------------------------------------------------------------- flags without effect


@pytest.mark.parametrize("script, flags", [
    ("coconut.py", "--data other"), ("codi.py", "--data other"), ("codi.py", "--ood other")])
def test_a_question_needs_no_data(known, tmp_path, script, flags):
    (tmp_path / "best.pt").write_bytes(known[script]["best.pt"])
    argv = ["--eval-only", "best.pt", "--ask", "Ann has 3 pens.", *flags.split()]
    ended = stress.in_process(script, argv, tmp_path, 60)
    assert ended.code == 2 and f"{flags.split()[0]} does nothing with --ask" in ended.error
    assert stress.in_process(script, argv[:4], tmp_path, 60).code == 0


def test_updates_are_those_of_the_small_model(capsys):
    assert soft_thinking.parse_flags([]).updates == 1200
    assert soft_thinking.parse_flags(["--updates", "7"]).updates == 7
    with pytest.raises(SystemExit):
        soft_thinking.parse_flags(["--model", "cot.pt", "--updates", "7"])
    assert "--updates is for the small model" in capsys.readouterr().err


def test_what_a_terminal_cannot_print_is_escaped(monkeypatch):
    buffer = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(buffer, "ascii", write_through=True))
    with pytest.raises(SystemExit) as stop:
        runtime.run_main(lambda: print("97.2 \u00b1 2.5, \udcff"))
    assert stop.value.code is None and buffer.getvalue() == b"97.2 \\xb1 2.5, \\udcff\n"
