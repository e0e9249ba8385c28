"""What is promised of report.py: the page of a run is whole, by itself, and tells the truth."""

import json
import re
import shutil
from collections import Counter
from html.parser import HTMLParser
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import data
import device_views
import evaluate
import figures
import model
import report
import samples
import sources
from configs import ReportConfig, TrainConfig
from evaluate import Predictions
from flags import parse
from model import Block, ViT
from parallel import Grid
from testing import TINY, batch_of, paint, random_weights, run_command, run_training

ODD = ["<b>bold", "c & d", 'quote"s']  # names of classes


def table_of(labels, classes, probabilities):
    """One best class each; label -100 is an unreadable image."""
    return Predictions(torch.tensor(labels), torch.zeros(len(labels), dtype=torch.float64),
                       torch.tensor(probabilities, dtype=torch.float64)[:, None],
                       torch.tensor(classes)[:, None])


# ----------------------------------------------------------------------------- scores
TABLE = table_of([0, 0, 0, 1, 1, 2, -100], [0, 1, 1, 1, 0, 2, 0],
                 [1.0, 0.9, 0.95, 0.62, 0.61, 0.3, 0.0])


def test_scores_of_classes_are_shares_of_their_images():
    """By hand; what a class is taken for most often; a class without images is nan."""
    rows = evaluate.class_scores(TABLE, ["a", "b", "c", "d"])
    assert rows[:3] == [("a", 3, 1 / 3, 1 / 3, "b", 2), ("b", 2, 0.5, 0.5, "a", 1),
                        ("c", 1, 1.0, 1.0, "", 0)]
    assert rows[3][:2] == ("d", 0) and np.isnan(rows[3][2])
    assert evaluate.confusions(TABLE) == {(0, 0): 1, (0, 1): 2, (1, 1): 1, (1, 0): 1, (2, 2): 1}


def test_the_calibration_error_is_the_mean_gap_of_15_bins():
    """By hand: 0.9 is in bin 13, 1.0 with 0.95 in the last one, 0.61 and 0.62 share one; what is
    unreadable counts nowhere."""
    share, confidence, accuracy = report.bins(TABLE)
    assert share == pytest.approx([100 / 6, 100 / 3, 100 / 6, 100 / 3])
    assert confidence == pytest.approx([30, 61.5, 90, 97.5])
    assert accuracy == pytest.approx([100, 50, 0, 50])
    assert report.ece(TABLE) == pytest.approx((70 + 2 * 11.5 + 90 + 2 * 47.5) / 6)


def test_mistakes_are_the_surest_first(monkeypatch):
    monkeypatch.setattr(report, "tiles", lambda one, table, indices: indices)
    assert report.mistakes(None, TABLE) == [2, 1, 4]
    monkeypatch.setattr(report, "TILES", 2)
    assert report.mistakes(None, TABLE) == [2, 1]


def test_images_are_shown_as_the_model_sees_them(tmp_path, monkeypatch):
    """The loader's own pixels, also those of a device, which rounds otherwise: by 1 of 255."""
    monkeypatch.setattr(device_views, "engine", lambda device: None)
    (tmp_path / "a").mkdir()
    for i in range(2):
        samples.Shapes((50, 40), "val").load(i)[0].save(tmp_path / f"a/{i}.jpg", quality=95)
    images, vit = sources.scan_folder(tmp_path, ""), SimpleNamespace(image_hw=(16, 24))
    for decode in ("cpu", "gpu"):
        config = TrainConfig(num_workers=0, decode=decode)
        loader = data.eval_loader(images, config, vit.image_hw, 2, 0, 1, "cpu")
        run = SimpleNamespace(config=config, vit=vit)
        one = SimpleNamespace(images=images, loader=loader, run=run)
        for i, seen in enumerate(next(iter(loader))[0]):
            assert (report.view(one, i)[0].int() - seen.int()).abs().max() <= (decode == "gpu")


# ----------------------------------------------------------------------------- attention
def whole_attention(maps):
    """scaled_dot_product_attention, spelled out, that notes its weights' mean over heads."""
    def attend(q, k, v, dropout_p):
        weights = (q @ k.transpose(2, 3) / q.shape[-1] ** 0.5).softmax(-1)
        maps.append(weights.mean(1)[0])
        return weights @ v
    return attend


@pytest.mark.parametrize("mean", [False, True])
def test_attention_is_what_the_blocks_compute(monkeypatch, mean):
    """The last block's map and the rollout, from the weights that attention itself used (1e-6 of
    fp32 sums): of token 0, or where the head reads the patches' mean, of their mean. Both are
    shares: their sum is 1."""
    vit, maps = ViT(TINY, seed=None), []
    vit.load_state_dict(random_weights(TINY, scale=0.5))
    if mean:  # a last block that computes all tokens
        last = Block(TINY, Grid().tp, 0.0)
        last.load_state_dict(vit.blocks[-1].state_dict())
        vit.blocks[-1] = last
    images, _ = batch_of(TINY, 1)
    run = SimpleNamespace(autocast=torch.no_grad)
    last, rollout = report.attention_maps(run, vit, images)
    monkeypatch.setattr(model.F, "scaled_dot_product_attention", whole_attention(maps))
    vit(images)
    size, first = TINY.seq_length, TINY.num_class_tokens
    e = torch.zeros(size)
    e[first if mean else 0:size if mean else 1] = 1 / TINY.num_patches if mean else 1
    expected = e @ maps[1] if mean else maps[1][0]
    assert last.tolist() == pytest.approx(expected.tolist(), abs=1e-6)
    expected = (expected + e) / 2 @ (maps[0] + torch.eye(size)) / 2
    assert rollout.tolist() == pytest.approx(expected.tolist(), abs=1e-6)
    assert last.sum() == pytest.approx(1, abs=1e-6) and rollout.sum() == pytest.approx(1, abs=1e-6)


# ----------------------------------------------------------------------------- charts
def test_ticks_are_round_and_within():
    assert figures.ticks(0, 90_000) == [(20_000 * i, f"{20_000 * i:,}") for i in range(5)]
    assert [label for _, label in figures.ticks(-0.2, 0.3)] == ["-0.2", "-0.1", "0", "0.1", "0.2",
                                                                "0.3"]
    log = figures.ticks(np.log(0.15), np.log(7), np.log)
    assert [label for _, label in log] == ["0.2", "0.5", "1", "2", "5"]
    assert log[2][0] == 0
    assert [label for _, label in figures.ticks(np.log(0.15), np.log(1e4), np.log)] == [
        "1", "10", "100", "1,000", "10,000"]
    assert figures.ticks(np.log(5.2), np.log(6.9), np.log) == [
        (np.log(5.5), "5.5"), (np.log(6), "6"), (np.log(6.5), "6.5")]


def test_a_chart_draws_means_of_many_points_in_its_frame():
    """1,000 points become 200 means of five; everything lies in the frame; a log axis leaves out
    what has no logarithm; without a point there is no chart."""
    points = [(x, 1000 - x) for x in range(1000)]
    svg = figures.chart("T", "u", [("name", "--c0", True, points)], "x")
    places = [tuple(map(float, p)) for p in re.findall(r'cx="([\d.]+)" cy="([\d.]+)"', svg)]
    assert len(places) == 200 and places == sorted(places) and "name" in svg
    assert all(50 <= x <= 370 and 10 <= y <= 192 for x, y in places)
    assert places[0] == (50, 10) and places[-1][0] == 370
    log = figures.chart("T", "u", [("", "--c0", True, [(0, 0.0), (1, 1.0), (2, 10.0)])], "x",
                       figures.math.log)
    assert log.count("<circle") == 2
    assert figures.chart("T", "u", [("", "--c0", True, [])], "x") == ""


def test_pictures_are_laid_side_by_side():
    cells = np.arange(2 * 3 * 4 * 5 * 3, dtype=np.uint8).reshape(2, 3, 4, 5, 3)
    sheet = np.asarray(figures.mosaic(cells))
    assert sheet.shape == (10, 18, 4)
    assert (sheet[5:9, 12:17, :3] == cells[1, 2]).all() and (sheet[5:9, 12:17, 3] == 255).all()
    assert (sheet[4, :, 3] == 0).all() and (sheet[:, 5, 3] == 0).all()
    ends = figures.viridis(np.array([[0.0, 0.5, 1.0]]))
    assert ends.tolist() == [[[68, 1, 84], [33, 145, 140], [253, 231, 37]]]


# ----------------------------------------------------------------------------- the page
class Page(HTMLParser):
    """What a page is made of; fails for a tag that is not closed where it was opened."""

    MAY_STAY_OPEN = {"td", "th", "tr", "img", "meta", "br", "path", "circle"}

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.outside, self.text = [], [], [], ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.outside += [v for k, v in attrs if k in ("src", "href") and not v.startswith("data:")]
        self.open += [tag] if tag not in self.MAY_STAY_OPEN else []

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        if tag not in self.MAY_STAY_OPEN:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(an output directory whose run was resumed at step 3 and made its page, what it printed)."""
    folder = tmp_path_factory.mktemp("report")
    for i, name in enumerate(ODD):
        for split, count in (("train", 12), ("val", 4 + i)):
            for n in range(count):
                paint(folder / "data" / split / name / f"{n}.png", colour=(80 * i, 9 * n, 200))
    (folder / "data/val" / ODD[0] / "broken.png").write_bytes(b"no image")
    flags = ["--data", folder / "data", "--log-interval", 1, "--eval-interval", 2]
    run_training(folder / "run", *flags, "--max-steps", 3)
    _, _, outputs = run_training(folder / "run", *flags, "--max-steps", 6, "--report")
    return folder / "run", outputs[0]


def test_training_ends_with_a_page_that_is_whole_and_by_itself(trained):
    """--report: tags nest, nothing is fetched, class names are text and not HTML, the figures are
    those printed, pictures are all there, and the resumption is marked in each of five curves."""
    output, printed = trained
    text = (output / "report.html").read_text()
    page = Page(text)
    assert page.outside == [] and not re.search(r"@import|url\(|<script", text)
    told = re.findall(r"top-1 ([\d.]+ %), .* loss ([\d.]+) on 15 images \(1 unread", printed)
    top1, loss = told[-1]
    assert all(word in page.text for word in (top1, loss, *ODD, "1 x CPU", torch.__version__))
    assert "<b>bold" not in text and page.text.count("Attention") == 1
    wrong = round(15 * (1 - float(top1[:-2]) / 100))
    pictures = [attrs["src"] for tag, attrs in page.tags if tag == "img"]
    assert len(pictures) == wrong + 15 + 3 * 6 + 2
    kinds = Counter(attrs.get("class") for tag, attrs in page.tags if tag == "figure")
    assert kinds["wrong"] + kinds["right"] == wrong + 15 and kinds["wrong"] == 2 * wrong
    assert (kinds["three"], kinds["big"], kinds["wide"]) == (6, 2, 1)
    marks = [attrs for tag, attrs in page.tags if attrs.get("class") == "mark"]
    lines = [json.loads(x) for x in (output / "metrics.jsonl").read_text().splitlines()]
    assert len(marks) == 5 and [x["step"] for x in lines if "resumed" in x] == [3]
    assert page.text.count("validation") == 4  # two keys, the figure's name, the classes' words
    assert (output / "classes.csv").exists() is False


def test_two_runs_lie_side_by_side(trained, tmp_path):
    """Each has its panels, both one set of curves; the page is in the first, and the data may have
    moved."""
    output, _ = trained
    shutil.copytree(output, tmp_path / "copy")
    lines = (tmp_path / "copy/metrics.jsonl").read_text().splitlines()
    (tmp_path / "copy/metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 7, "lo')  # a crash
    shutil.move(output.parent / "data", tmp_path / "data")
    before = (output / "report.html").read_text()
    try:
        argv = [tmp_path / "copy", output]
        assert f"no folder {output.parent / 'data'}" in run_command(report.main, *argv, code=2)
        text = run_command(report.main, *argv, "--data", tmp_path / "data")
    finally:
        shutil.move(tmp_path / "data", output.parent / "data")
    assert "report.html: 0." in text and (output / "report.html").read_text() == before
    page = Page((tmp_path / "copy/report.html").read_text())
    heads = [tag for tag, _ in page.tags].count
    assert heads("h3") == 2 * 6 and heads("svg") == 5 + 2
    assert f"{tmp_path / 'copy'} training" in page.text and f"{output} training" in page.text


def test_a_run_is_opened_with_its_own_data_and_index(tmp_path, monkeypatch):
    """Its labels and the index of its tars too, which then are not read again; with --data no."""
    opened = []
    own = dict(data="photos", val_labels="labels.txt", index="photos.npz")
    monkeypatch.setattr(report, "newest_checkpoint", lambda path: path)
    monkeypatch.setattr(report, "read_meta", lambda path: dict(config=own))
    monkeypatch.setattr(report, "open_model",
                        lambda config, *rest: opened.append(config) or [0] * 5)
    for flags in ([], ["--data", "other"]):
        report.open_run("run", *parse(ReportConfig, [str(tmp_path), *flags]))
    assert [{name: getattr(config, name) for name in own} for config in opened] == [
        own, dict(data="other", val_labels=None, index=None)]
    assert {config.output_dir for config in opened} == {str(tmp_path)}  # run cannot be written
    report.open_run(str(tmp_path), *parse(ReportConfig, ["run"]))
    assert opened[-1].output_dir == str(tmp_path)  # where an index of its tars lies by default


def test_many_classes_are_told_by_the_ends_of_lists():
    """31 classes: no matrix, but an accuracy chart, 15 lowest, 15 highest, and the pairs."""
    labels = [i for i in range(31) for _ in range(2)]
    classes = [label if i % 2 or label % 3 else (label + 1) % 31 for i, label in enumerate(labels)]
    one = SimpleNamespace(names=[f"name{i}" for i in range(31)])
    text = report.classes(one, table_of(labels, classes, [0.5] * 62))
    assert "Confusions" not in text and text.count('class="bar"') == 30 and text.count("<svg") == 1
    assert text.count("50.0 % of 2") == 11 and text.count("<td>1</td>") == 11
    few = report.classes(SimpleNamespace(names=list("abc")), TABLE)
    assert "Confusions" in few and few.count('class="hit"') == 3 and few.count('class="miss"') == 6


def test_flags_of_the_report(capsys):
    """Several outputs; each field a flag; a run that is not there is one line of error."""
    config, given = parse(ReportConfig, ["a", "b", "--data", "d"])
    assert config.output == ["a", "b"] and set(given) == {"output", "data"}
    with pytest.raises(SystemExit) as stop:
        parse(ReportConfig, ["--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0 and text.startswith("usage: report.py OUTPUT [flags]")
    assert all(f"--{name}" in text for name in ("data", "val-labels", "num-workers"))
    with pytest.raises(ValueError, match="--val-labels has no effect without --data"):
        parse(ReportConfig, ["a", "--val-labels", "f"])
    assert "no complete checkpoint" in run_command(report.main, "/nowhere", code=2)
