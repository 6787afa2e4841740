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
