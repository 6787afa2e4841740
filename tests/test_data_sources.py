"""data_prep.py: format, caches, downloads, GSM8k-Aug, ProsQA's generator, command line.

No network."""

import hashlib
import http.server
import json
import os
import random
import runpy
import sys
import threading
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import data_prep as dp
from common import puzzles, readers
from common.files import RELEASED, download, released_files
from common.graphs import adjacency, has_detour, shortest_paths
from common.puzzles import generate, prosqa_item, prosqa_mini, prosqa_puzzle
from common.runtime import UserError

GOOD = {"question": "What is 1+1?", "steps": ["<<1+1=2>>"], "answer": "2"}

# Counted on the official ProsQA valid and test files (800 items).
OFFICIAL = {"steps": 3.771, "nodes": 22.806, "edges": 35.998, "shortest path": 3.771,
            "shortest paths": 1.586, "children of the root": 2.942, "grandchildren": 4.397,
            "entity names": 2.556, "question, words": 179.1, "root is node 1, %": 63.6,
            "right option first, %": 50.5,
            "floor: more ancestors, %": 70.7, "floor: fewer in-edges, %": 66.4}
OFFICIAL_STEPS = {3: 40.8, 4: 43.8, 5: 13.1, 6: 2.4}    # % of items


@pytest.fixture(scope="module")
def prosqa():
    return generate(lambda rng: [prosqa_item(rng)], (1000, 250, 250), 0)


# ---------------------------------------------------------------- generator

def check_graph_item(item):
    """The question alone must give the graph back, and the graph must justify steps and answer."""
    name, edges = item["idx_to_symbol"], {tuple(e) for e in item["edges"]}
    assert len(edges) == len(item["edges"]) and len(set(name)) == len(name)
    children = adjacency(edges)
    with_parents = {b for _, b in edges}
    facts, asked = item["question"][:-1].rsplit(". ", 1)
    facts = [f.removeprefix("Every ").split(" is a ") for f in facts.split(". ")]
    assert sorted(map(tuple, facts)) == sorted((name[a], name[b]) for a, b in edges)
    for v, symbol in enumerate(name):
        assert symbol[0].isupper() == (v not in with_parents)
        told_of_all = f"Every {symbol} is" in item["question"]
        assert told_of_all == (v in with_parents and bool(children[v]))
    root, target, wrong = item["root"], item["target"], item["neg_target"]
    options = asked.removeprefix(f"Is {name[root]} a ").split(" or ")
    assert sorted(options) == sorted([name[target], name[wrong]])
    here, there = (shortest_paths(children, r)[0] for r in (root, 1 - root))
    assert target in here and target not in there and wrong in there and wrong not in here
    assert not children[target] and not children[wrong]
    assert item["answer"] == f"{name[root]} is a {name[target]}."
    at = name[root]
    for i, step in enumerate(item["steps"]):
        assert step in item["question"]
        subject, nxt = step.removeprefix("Every ").removesuffix(".").split(" is a ")
        assert subject == at and step.startswith("Every ") == (i > 0)
        at = nxt
    assert at == name[target] and len(item["steps"]) == here[target]


def test_prosqa_invariants(prosqa):
    questions = [item["question"] for item in sum(prosqa.values(), [])]
    assert len(set(questions)) == 1500
    for items in prosqa.values():
        for item in items:
            check_graph_item(item)
            assert 3 <= len(item["steps"]) <= 6


def test_prosqa_statistics_match_the_official_files(prosqa):
    rows = dp.stats(sum(prosqa.values(), []))
    for key, mean in OFFICIAL.items():
        assert rows[key] == pytest.approx(mean, rel=0.05), key
    for n, share in OFFICIAL_STEPS.items():
        assert rows[f"  {n} steps, %"] == pytest.approx(share, abs=4), n


def test_steps_are_any_of_the_shortest_paths():
    rng, paths = random.Random(1), set()
    for _ in range(200):
        item = prosqa_item(rng)
        children = adjacency(item["edges"])
        n = shortest_paths(children, item["root"])[1][item["target"]]
        paths.add(n)
    assert {1, 2} <= paths

    diamond = [1, 2, 1, 1, 1, 2], [(0, 2), (0, 3), (2, 4), (3, 4), (1, 5)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(puzzles, "prosqa_graph", lambda rng, n: diamond)
        items = [prosqa_item(rng, prosqa_puzzle(rng, min_steps=2)) for _ in range(200)]
    ends = [item["steps"][0].split()[-1][:-1] for item in items]
    first = [item["idx_to_symbol"].index(end) for item, end in zip(items, ends)]
    assert 60 < first.count(2) < 140 and first.count(2) + first.count(3) == 200


def test_mini():
    """3 steps, few names, options that look alike; each training graph eight times; evaluated
    graphs twice, once from each root, with a detour from both: no comparison of the two options
    tells which is right."""
    splits = prosqa_mini((320, 10, 30))
    assert {s: len(items) for s, items in splits.items()} == dict(train=320, valid=10, test=30)
    names = set()
    for items in splits.values():
        names.update(*(item["idx_to_symbol"] for item in items))
    assert len(names) == 16
    for split, items in splits.items():
        for item in items:
            check_graph_item(item)
            children = adjacency(item["edges"])
            parents = adjacency(item["edges"], reverse=True)
            wrong = item["neg_target"]
            assert len(item["steps"]) == 3
            others = [v for v in list(children) if not parents[v] and v != item["root"]]
            at_depth = [v for v in others if shortest_paths(children, v)[0].get(wrong) == 3]
            assert at_depth
            if split != "train":
                assert has_detour(item["edges"], item["root"], item["target"])
                assert any(has_detour(item["edges"], v, wrong) for v in at_depth)
    graphs = {s: {str(item["edges"]) for item in items} for s, items in splits.items()}
    assert len(graphs["train"]) == 40 and len(graphs["test"]) == 15
    rows = dp.stats(splits["test"])
    assert 10 < rows["nodes"] < 12
    assert rows["floor: more ancestors, %"] == rows["floor: fewer in-edges, %"] == 50


def test_same_seed_same_bytes(tmp_path):
    def make(out, *flags):
        argv = ["prosqa", "--generate", "--sizes", "30,10,10", "--out", str(tmp_path / out), *flags]
        assert dp.main(argv) == 0
        return [(tmp_path / out / f"{s}.json").read_bytes() for s in dp.SPLITS]
    first = make("a")
    assert first == make("b")
    assert first != make("c", "--seed", "1")
    longer = make("d", "--sizes", "40,10,10")     # test does not depend on the size of train
    assert longer[1:] == first[1:] and longer[0].startswith(first[0][:-3])


def test_generator_gives_up_when_questions_run_out():
    with pytest.raises(UserError, match="--sizes"):
        generate(lambda rng: [{"question": str(rng.randrange(3))}], (5, 1, 1), 0)


# ---------------------------------------------------------------- format

@pytest.mark.parametrize("change, words", [
    ({"question": ...}, "no field 'question'"), ({"steps": ...}, "no field 'steps'"),
    ({"answer": ...}, "no field 'answer'"), ({"question": 3}, "'question' is int"),
    ({"steps": "a"}, "'steps' is str"), ({"steps": ["a", 2]}, "'steps', step 2, is int"),
    ({"answer": None}, "'answer' is NoneType"), ({"question": " "}, "'question' is empty"),
    ({"answer": ""}, "'answer' is empty"), ({"edges": [[0, 1]]}, "'idx_to_symbol'"),
    ({"edges": [[0, 1]], "idx_to_symbol": [1, 2]}, "not a list of names"),
    ({"edges": [[0, 9]], "idx_to_symbol": ["A", "b"]}, "'edges'"),
    ({"edges": [[0, 1]], "idx_to_symbol": ["A", "b"], "root": 0, "target": 7}, "'target'"),
])
def test_bad_item_is_named(tmp_path, change, words):
    bad = {k: v for k, v in {**GOOD, **change}.items() if v is not ...}
    path = tmp_path / "train.json"
    path.write_text(json.dumps([GOOD, bad]))
    with pytest.raises(UserError) as error:
        readers.read_split(path)
    assert f"{path}, item 2: " in str(error.value) and words in str(error.value)


@pytest.mark.parametrize("content, words", [
    (b'[{"question": ', "not JSON"), (b"\xff\xfe", "not UTF-8"),
    (b'{"question": 1}', "item 1: field 'question' is int"),
    (b"[3]", "item 1: is int"), (b"[" * 10 ** 5, "not JSON")])
def test_bad_file_is_named(tmp_path, content, words):
    path = tmp_path / "valid.json"
    path.write_bytes(content)
    with pytest.raises(UserError) as error:
        readers.read_split(path)
    assert str(path) in str(error.value) and words in str(error.value)


def test_duplicates_between_splits(capsys, tmp_path):
    other = {**GOOD, "question": "Other?"}
    splits = {"train": [other, GOOD], "valid": [], "test": [GOOD]}
    with pytest.raises(UserError, match=r"test\.json, item 1, is also that of train\.json, item 2"):
        dp.write_dataset(tmp_path / "mine", splits)
    assert not (tmp_path / "mine").exists()
    assert dp.validate({"train": [GOOD, GOOD]}, "x") == 0      # within one split it does no harm
    dp.write_dataset(tmp_path / "gsm8k", splits, released=True)
    assert "1 questions stand in more than one split" in capsys.readouterr().out
    assert dp.load("gsm8k", tmp_path, need=("train", "test")) == splits
    with pytest.raises(UserError, match="valid.json has no items"):
        dp.load("gsm8k", tmp_path)


@pytest.mark.parametrize("broken", ["replace", "fsync"])
def test_crash_leaves_the_old_file(tmp_path, monkeypatch, broken):
    path = tmp_path / "train.json"
    dp.write_json(path, [GOOD])
    before = path.read_bytes()

    def crash(*args):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(os, broken, crash)
    with pytest.raises(OSError):
        dp.write_dataset(tmp_path, {"train": [{**GOOD, "answer": "3"}],
                                    "test": [{**GOOD, "question": "b"}]})
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["train.json"]


def test_no_rename_before_all_is_written(tmp_path, monkeypatch):
    sync, calls = os.fsync, []

    def crash_second(fd):
        calls.append(fd)
        if len(calls) == 2:
            raise KeyboardInterrupt
        sync(fd)
    monkeypatch.setattr(os, "fsync", crash_second)
    with pytest.raises(KeyboardInterrupt):
        dp.write_dataset(tmp_path, {"train": [GOOD], "test": [{**GOOD, "question": "b"}]})
    assert os.listdir(tmp_path) == []


def test_load(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(dp.EMBEDDED, "prosqa-mini", lambda: prosqa_mini((20, 5, 5)))
    made = dp.load("prosqa-mini", tmp_path)
    assert [len(made[s]) for s in dp.SPLITS] == [20, 5, 5]
    assert "making it" in capsys.readouterr().out
    assert dp.load("prosqa-mini", tmp_path) == made == dp.load(str(tmp_path / "prosqa-mini"))
    with pytest.raises(UserError, match="'python data_prep.py gsm8k'"):
        dp.load("gsm8k", tmp_path)
    with pytest.raises(UserError, match="name one of"):
        dp.load("nonsense", tmp_path)
    (tmp_path / "prosqa-mini" / "train.json").unlink()
    with pytest.raises(UserError, match="no train.json"):
        dp.load("prosqa-mini", tmp_path)
    assert set(dp.load("prosqa-mini", tmp_path, need=("test",))) == {"valid", "test"}


# ---------------------------------------------------------------- caches


@pytest.mark.parametrize("changed", range(len(dp.SOURCES)))
def test_a_changed_source_makes_the_cache_anew(tmp_path, monkeypatch, changed):
    """Caches are those of the present code: they go with each of the files that they depend on."""
    sources = []
    for i, source in enumerate(dp.SOURCES):
        sources.append(tmp_path / f"source{i}.py")
        sources[i].write_bytes(Path(source).read_bytes())
    monkeypatch.setattr(dp, "SOURCES", tuple(sources))
    made = []

    def cached():
        def make():
            made.append(len(made))
            return b"made %d" % made[-1]
        return dp.cached(tmp_path / ".tokens", "of this", make).tobytes()

    assert cached() == cached() == b"made 0"
    with open(sources[changed], "a") as f:
        f.write("# another version\n")
    assert cached() == cached() == b"made 1" and made == [0, 1]


def test_sources_are_the_code_that_makes_what_is_kept():
    assert [Path(source).relative_to(ROOT).as_posix() for source in dp.SOURCES] == [
        "data_prep.py", "common/text.py", "common/readers.py", "common/scoring.py"]


# ---------------------------------------------------------------- download

BODY = random.Random(0).randbytes(300_000)
SHA = hashlib.sha256(BODY).hexdigest()


@pytest.fixture
def server():
    """A server of BODY at any path; .seen lists the Range headers; .ranges and .cut change what it
    does."""
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            wanted = self.headers.get("Range")
            httpd.seen.append(wanted)
            start = int(wanted[6:-1]) if wanted and httpd.ranges else 0
            if self.path == "/missing":
                return self.send_error(404)
            if start >= len(BODY):
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{len(BODY)}")
                return self.end_headers()
            self.send_response(206 if start else 200)
            self.send_header("Content-Length", str(len(BODY) - start))
            self.end_headers()
            self.wfile.write(BODY[start:httpd.cut])

        def log_message(self, *args):
            pass

    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    httpd.seen, httpd.ranges, httpd.cut = [], True, None
    httpd.url = f"http://127.0.0.1:{httpd.server_port}/file.bin"
    threading.Thread(target=httpd.serve_forever, args=(0.01,), daemon=True).start()
    yield httpd
    httpd.shutdown()
    httpd.server_close()


def test_download_whole_and_once(server, tmp_path):
    path = download(server.url, tmp_path / "raw" / "f", len(BODY), SHA)
    assert path.read_bytes() == BODY and os.listdir(path.parent) == ["f"]
    download(server.url, path, len(BODY), SHA)
    assert server.seen == [None]
    path.write_bytes(b"damaged")
    assert download(server.url, path, len(BODY), SHA).read_bytes() == BODY


@pytest.mark.parametrize("ranges", [True, False])
def test_download_resumes(server, tmp_path, ranges):
    server.cut = 100_000
    words = "broke off after 100,000 of 300,000 bytes; run the same command"
    with pytest.raises(UserError, match=words):
        download(server.url, tmp_path / "f", len(BODY), SHA)
    assert os.listdir(tmp_path) == ["f.part"]
    server.cut, server.ranges = None, ranges
    assert download(server.url, tmp_path / "f", len(BODY), SHA).read_bytes() == BODY
    assert server.seen == [None, "bytes=100000-"]


@pytest.mark.parametrize("size", [None, len(BODY)])
@pytest.mark.parametrize("extra", [b"", b"more"])
def test_complete_or_overlong_part(server, tmp_path, size, extra):
    (tmp_path / "f.part").write_bytes(BODY + extra)
    assert download(server.url, tmp_path / "f", size, SHA).read_bytes() == BODY


def test_download_wrong_hash_or_size_leaves_nothing(server, tmp_path):
    for size, sha in ((len(BODY), "0" * 64), (None, "0" * 64), (5, SHA)):
        with pytest.raises(UserError, match=SHA):
            download(server.url, tmp_path / "f", size, sha)
        assert os.listdir(tmp_path) == []


def test_download_pins_an_unknown_hash(server, tmp_path, capsys, monkeypatch):
    path = download(server.url, tmp_path / "f")
    assert SHA in capsys.readouterr().out
    assert json.loads((tmp_path / "SHA256SUMS.json").read_text()) == {"f": SHA}
    download(server.url, path)
    assert len(server.seen) == 1
    path.unlink()
    monkeypatch.setitem(globals(), "BODY", BODY[::-1])
    with pytest.raises(UserError, match=f"expected .* with {SHA}"):
        download(server.url, path)
    assert os.listdir(tmp_path) == ["SHA256SUMS.json"]


def test_download_without_network(server, tmp_path):
    with pytest.raises(UserError, match="answered 404 for .*--from PATH"):
        download(server.url.replace("file.bin", "missing"), tmp_path / "f", 1, SHA)
    with pytest.raises(UserError, match="cannot reach http://127.0.0.1:9/f .*--from PATH"):
        download("http://127.0.0.1:9/f", tmp_path / "f", 1, SHA)
    assert os.listdir(tmp_path) == []
    (tmp_path / "f").write_text("put here by hand")
    with pytest.raises(UserError, match="cannot reach"):
        download("http://127.0.0.1:9/f", tmp_path / "f")
    assert (tmp_path / "f").read_text() == "put here by hand"


# ---------------------------------------------------------------- GSM8k-Aug

@pytest.mark.parametrize("line, steps, answer", [
    ("A?||<<1+2=3>> <<3*4=12>> #### 12", ["<<1+2=3>>", "<<3*4=12>>"], "12"),
    ("A?||<<1000*1450=1450000>> #### 1,450,000", ["<<1000*1450=1450000>>"], "1450000"),
    ("A?||<<3-8=-5>> #### -5", ["<<3-8=-5>>"], "-5"),
    ("A?||<<5/2=2.5>> #### 2.50", ["<<5/2=2.5>>"], "2.50"),
    ("A?||<<2/.5=4>> #### .5", ["<<2/.5=4>>"], ".5"),
    ("A? ||#### 7", [], "7"),
    ("A?|| <<4 + 4 = 8>>  <<8/2=4>> ####4", ["<<4 + 4 = 8>>", "<<8/2=4>>"], "4"),
    ("A?||<<1+1=2>> #### Bob, Eve", ["<<1+1=2>>"], "Bob, Eve"),
])
def test_gsm8k_line(line, steps, answer):
    item = {"question": "A?", "steps": steps, "answer": answer}
    assert readers.gsm8k_item(readers.parse_line(line, "f"), "f") == item


@pytest.mark.parametrize("line", [
    "A? <<1+2=3>> #### 3", "A?||<<1+2=3>> 3", "A?||b||<<1+2=3>> #### 3",
    "A?||<<1+2=3>> #### 3 #### 4", "A?||<<1+2=3>> so <<3+1=4>> #### 4", "A?||<<1+2=3 #### 3",
    "||<<1+2=3>> #### 3", "A?||<<1+2=3>> #### "])
def test_gsm8k_malformed_line_is_named(tmp_path, line):
    (tmp_path / "test.txt").write_text("Q?||#### 1\n" + line + "\n")
    with pytest.raises(UserError, match=r"test\.txt, line 2"):
        readers.read_gsm8k(tmp_path / "test.txt")


def test_gsm8k_from_folder(tmp_path, capsys):
    # U+2028 is a line break to str.splitlines(), not to the format
    (tmp_path / "gsm8k_aug_valid.txt").write_text("Q\u2028é?||#### 1\r\n\n", encoding="utf-8")
    (tmp_path / "test.txt").write_text("R?||<<1+1=2>> #### 2", encoding="utf-8")
    assert dp.main(["gsm8k", "--from", str(tmp_path), "--out", str(tmp_path / "out")]) == 0
    assert "train is left out" in capsys.readouterr().out
    splits = dp.load(str(tmp_path / "out"), need=())
    assert splits["valid"] == [{"question": "Q\u2028é?", "steps": [], "answer": "1"}]
    assert len(splits["test"]) == 1
    assert dp.main(["stats", str(tmp_path / "out")]) == 0
    assert "numeric answers, %" in capsys.readouterr().out


# ---------------------------------------------------------------- command line

def test_prosqa_from_folder_and_stats(prosqa, tmp_path, capsys):
    (tmp_path / "prosqa_test.json").write_text(json.dumps(prosqa["test"]))
    assert dp.main(["prosqa", "--from", str(tmp_path), "--out", str(tmp_path / "prosqa")]) == 0
    assert sorted(os.listdir(tmp_path / "prosqa")) == ["test.json"]
    assert dp.main(["stats", str(tmp_path / "prosqa")]) == 0
    assert "floor: more ancestors" in capsys.readouterr().out


def test_released_files_are_downloaded(server, tmp_path, monkeypatch):
    files = {s: (server.url + s, len(BODY), SHA) for s in dp.SPLITS}
    monkeypatch.setitem(RELEASED, "gsm8k", files)
    found = released_files("gsm8k", tmp_path)
    assert {s: p.read_bytes() == BODY for s, p in found.items()} == dict.fromkeys(dp.SPLITS, True)


@pytest.mark.parametrize("argv", [
    ["stats", "nowhere"], ["prosqa", "--from", "nowhere"], ["gsm8k", "--from", "nowhere"],
    ["prosqa", "--generate", "--from", "x"], ["prosqa", "--generate", "--sizes", "1,2"],
    ["prosqa-mini", "--sizes", "2,1,1", "--out", "/dev/null/x"], ["stats", "bad"], []])
def test_bad_input_is_one_sentence_and_exit_2(tmp_path, monkeypatch, capsys, argv):
    """The script as it is started, in this process: a traceback would be another exception than
    SystemExit."""
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "test.json").write_text("[{}]")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["data_prep.py", *argv])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(ROOT / "data_prep.py"), run_name="__main__")
    said = capsys.readouterr().err
    assert stop.value.code == 2
    assert said.strip().splitlines()[-1].startswith("data_prep.py: ") or "usage:" in said


def test_help_covers_every_flag(capsys):
    for name, (_, what, flags) in dp.COMMANDS.items():
        with pytest.raises(SystemExit) as stop:
            dp.main([name, "--help"])
        assert stop.value.code == 0 and what.endswith(".")
        assert all(options["help"] for options in flags.values())
