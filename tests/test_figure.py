"""common/figure.py: points where they belong, well-formed SVG, refusals."""

import json
import re
import sys
import xml.etree.ElementTree as ElementTree

import pytest

from common import figure, runtime

SVG = "{http://www.w3.org/2000/svg}"


def lines_of(path):
    """The points of each line in a picture, in pixels."""
    lines = ElementTree.parse(path).getroot().iter(SVG + "polyline")
    return [[tuple(map(float, point.split(","))) for point in line.get("points").split()]
            for line in lines]


def run(argv):
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(sys, "argv", ["figure.py", *map(str, argv)])
        runtime.run_main(figure.main)
    return stop.value.code or 0


def write_run(folder, accuracies):
    folder.mkdir()
    events = [dict(event="stage", stage=i, accuracy=a) for i, a in enumerate(accuracies)]
    lines = map(json.dumps, [dict(event="train", loss=1.0), *events, dict(event="final")])
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    return folder


@pytest.mark.parametrize("high, least, expected", [
    (3, 1, [0, 1, 2, 3]), (1, 1e-9, [0, 0.2, 0.4, 0.6, 0.8, 1]), (0.013, 1e-9, [0, 0.005, 0.01]),
    (100, 1e-9, [0, 20, 40, 60, 80, 100]), (39, 1, [0, 10, 20, 30])])
def test_ticks(high, least, expected):
    assert figure.ticks(high, least) == pytest.approx(expected)


def test_points_are_in_their_places(tmp_path):
    """The axes begin at 0, the largest x is at the right end; top is at the upper one."""
    path = tmp_path / "x.svg"
    figure.line_plot(path, "<t>", "x", "y & z", {"a": [(0, 0), (2, 5), (4, 10)], "b": [(1, 20)],
                                                 "none": []}, top=20)
    assert lines_of(path)[:2] == [
        [(figure.LEFT, figure.BOTTOM),
         ((figure.LEFT + figure.RIGHT) / 2, (3 * figure.BOTTOM + figure.TOP) / 4),
         (figure.RIGHT, (figure.BOTTOM + figure.TOP) / 2)],
        [(figure.LEFT + (figure.RIGHT - figure.LEFT) / 4, figure.TOP)]]
    texts = [text.text for text in ElementTree.parse(path).getroot().iter(SVG + "text")]
    assert {"<t>", "x", "y & z", "a", "b"} <= set(texts)
    legend = [text for text in texts if text in ("a", "b")]
    assert legend == ["a", "b"]


def test_numbers_on_the_x_axis(tmp_path):
    """Whole numbers where all x are whole, parts of one where they are not."""
    for x, written in ((1, ["0", "1"]), (0.5, ["0", "0.1", "0.2", "0.3", "0.4", "0.5"])):
        figure.line_plot(tmp_path / "x.svg", "t", "x", "y", {"a": [(0, 0), (x, 1)]})
        texts = ElementTree.parse(tmp_path / "x.svg").getroot().iter(SVG + "text")
        assert [t.text for t in texts if float(t.get("y")) == figure.BOTTOM + 20] == written


def test_nothing_to_draw(tmp_path):
    figure.line_plot(tmp_path / "x.svg", "t", "x", "y", {})
    assert lines_of(tmp_path / "x.svg") == []


def test_accuracy_by_stage(tmp_path, capsys):
    runs = [write_run(tmp_path / "one", [1.0, 0.5]), write_run(tmp_path / "two", [0.0, 0.25])]
    assert run([tmp_path / "x.svg", *runs]) == 0
    assert "wrote" in capsys.readouterr().out
    height = figure.BOTTOM - figure.TOP
    assert lines_of(tmp_path / "x.svg") == [
        [(figure.LEFT, figure.TOP), (figure.RIGHT, figure.BOTTOM - height / 2)],
        [(figure.LEFT, figure.BOTTOM), (figure.RIGHT, figure.BOTTOM - height / 4)]]
    picture = (tmp_path / "x.svg").read_text()
    numbers = re.findall(r'<text x="([-\d.]+)" y="([-\d.]+)"', picture)
    assert all(-figure.HEIGHT < float(x) < figure.WIDTH for x, _ in numbers)
    assert all(0 < float(y) < figure.HEIGHT for _, y in numbers)


@pytest.mark.parametrize("content", [None, "", "no json\n", '{"event": "train"}\n'])
def test_folder_without_stages(tmp_path, capsys, content):
    if content is not None:
        (tmp_path / "metrics.jsonl").write_text(content)
    assert run([tmp_path / "x.svg", tmp_path]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"figure.py: {tmp_path} has no metrics.jsonl with a finished stage")
    assert error.count("\n") == 1 and not (tmp_path / "x.svg").exists()


# ---------------------------------------------------------------- by a setting

def write_table(path, rows, **settings):
    """A table.json with these {label: accuracies}."""
    found = []
    for label, accuracy in rows.items():
        method, _, kind = label.partition(":")
        found.append(dict(method=method, thoughts=kind or "keep", accuracy=accuracy))
    path.write_text(json.dumps(dict(settings=settings, rows=found)))
    return path


def test_by_a_setting(tmp_path, capsys):
    """A line per row from table to table, in the order of the setting, and a dot per seed; rows of
    the battery only where --rows names them; tables of one value go together."""
    four = write_table(tmp_path / "4.json", {"a": [100.0, 50.0], "a:swap": [0.0], "b": [50.0]},
                       n_layer=4, data="chains")
    two = write_table(tmp_path / "2.json", {"a": [0.0], "a:swap": [25.0], "b": [100.0]}, n_layer=2,
                      data="other")
    more = write_table(tmp_path / "more.json", {"a": [50.0], "b": [100.0]}, n_layer=2, data="x")
    picture, height = tmp_path / "x.svg", figure.BOTTOM - figure.TOP
    middle = (figure.LEFT + figure.RIGHT) / 2

    def draw(*argv):
        assert run([picture, *argv]) == 0
        circles = ElementTree.parse(picture).getroot().iter(SVG + "circle")
        return lines_of(picture), len(list(circles))

    assert draw("--by", "n-layer", four, two, more) == ([
        [(middle, figure.BOTTOM - height / 4), (figure.RIGHT, figure.BOTTOM - 0.75 * height)],
        [(middle, figure.TOP), (figure.RIGHT, figure.BOTTOM - height / 2)]], 2 + 2 + 2 + 1)
    assert draw("--by", "n_layer", four, two, "--rows", "a:swap") == (
        [[(middle, figure.BOTTOM - height / 4), (figure.RIGHT, figure.BOTTOM)]], 2)
    draw("--by", "data", four, two)                      # no numbers: in the order of the files
    text = [text.text for text in ElementTree.parse(picture).getroot().iter(SVG + "text")]
    assert "chains" in text and "other" in text and "Accuracy by data" in text
    draw("--by", "n_layer", four, two, "--label", "layers")
    text = [text.text for text in ElementTree.parse(picture).getroot().iter(SVG + "text")]
    assert "Accuracy by layers" in text and "layers" in text and "n_layer" not in text


@pytest.mark.parametrize("content, words", [
    (None, "x.json: not a table.json"), ("[]", "x.json: not a table.json"),
    ('{"rows": []}', "its settings ('settings')"), ('{"settings": {"c": 1}}', "('rows')"),
    ('{"settings": {"c": 1, "d": 2}, "rows": []}', "--by n_layer is no setting of it; choose "
                                                   "among c, d")])
def test_tables_without_the_setting(tmp_path, capsys, content, words):
    if content is not None:
        (tmp_path / "x.json").write_text(content)
    assert run([tmp_path / "x.svg", "--by", "n_layer", tmp_path / "x.json"]) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1 and not (tmp_path / "x.svg").exists()


@pytest.mark.parametrize("argv, words", [
    (["--by", "c", "--rows", "a,z"], "no row 'z'; choose --rows among a"),
    (["--rows", "a"], "--rows is for tables: add --by"),
    (["--label", "a"], "--label is for tables: add --by")])
def test_rows_that_are_not_there(tmp_path, capsys, argv, words):
    path = write_table(tmp_path / "1.json", {"a": [1.0]}, c=1)
    assert run([tmp_path / "x.svg", path, *argv]) == 2
    assert words in capsys.readouterr().err
