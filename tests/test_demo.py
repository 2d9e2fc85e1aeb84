"""The demo: propagation maps, cost measurement, charts and the report."""

from __future__ import annotations

import dataclasses
import json
import re
from html.parser import HTMLParser
from types import SimpleNamespace

import pytest
import timm
import torch

import gspn2
from gspn2.backends import DIRECTIONS
from gspn2.backends.reference import lines_back, lines_first, tap_weights
from gspn2.cli.main import main
from gspn2.demo import charts, cost, maps
from gspn2.nn import Mixer
from gspn2.training import load_checkpoint


def operands(height=7, width=9, channels=4, groups=1, directions=4, seed=0, lam=True, gate=True):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    per_channel = (1, directions, channels, height, width)
    return SimpleNamespace(
        x=draw(1, channels, height, width),
        logits=2 * draw(1, directions, groups, 3, height, width),
        lam=draw(*per_channel) if lam else None,
        gate=draw(*per_channel) if gate else None,
    )


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_an_impulse_reaches_the_cone_before_it_and_nothing_else(direction):
    pixel = (3, 4)
    found = maps.propagation_map(operands(directions=1, lam=False, gate=False), pixel, (direction,))
    rows, columns = torch.meshgrid(torch.arange(7), torch.arange(9), indexing="ij")
    ahead = {
        "down": rows - pixel[0],
        "up": pixel[0] - rows,
        "right": columns - pixel[1],
        "left": pixel[1] - columns,
    }[direction]
    aside = (columns - pixel[1] if direction in ("down", "up") else rows - pixel[0]).abs()
    assert torch.equal(found.sent[direction] > 0, aside <= ahead)
    assert found.sent[direction][pixel] == 1


def test_an_impulse_stops_at_the_end_of_its_chunk():
    found = maps.propagation_map(operands(directions=1, lam=False, gate=False), (3, 4), ("down",), chunk=2)
    assert (found.sent["down"].sum(1) > 0).tolist() == [False] * 3 + [True] + [False] * 3
    found = maps.propagation_map(operands(directions=1, lam=False, gate=False), (2, 4), ("down",), chunk=2)
    assert (found.sent["down"].sum(1) > 0).tolist() == [False, False, True, True, False, False, False]


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_an_output_listens_to_each_earlier_line_with_weight_one(direction):
    """Taps are row-stochastic, so what comes from any one line is an average of it."""
    found = maps.propagation_map(operands(directions=1, lam=False, gate=False), (3, 4), (direction,))
    lines = lines_first(found.received, direction).sum(-1)
    place = {"down": 3, "up": 7 - 1 - 3, "right": 4, "left": 9 - 1 - 4}[direction]
    expected = (torch.arange(len(lines)) <= place).double()
    torch.testing.assert_close(lines, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_the_maps_are_rows_and_columns_of_one_matrix(groups):
    """The response at q to an impulse at p, found by line_scan, by the impulse and by the gradient."""
    given = operands(groups=groups)
    p, q = (2, 5), (4, 3)
    arguments = (given.x, given.logits, given.lam, given.gate)
    sent = maps.impulse_response(*arguments, p)
    received = maps.sensitivity(*arguments, q)
    torch.testing.assert_close(sent.sum(0)[:, q[0], q[1]], received[:, p[0], p[1]])
    impulse = torch.zeros_like(given.x)
    impulse[..., p[0], p[1]] = 1
    for d, direction in enumerate(DIRECTIONS):
        w = lines_back(tap_weights(lines_first(given.logits[:, d], direction)), direction)
        h = gspn2.line_scan(impulse, given.lam[:, d], w, direction=direction)
        torch.testing.assert_close(sent[d], (given.gate[:, d] * h)[0])


def test_a_map_adds_directions_before_it_takes_the_strength():
    """Opposite directions of opposite sign cancel at the pixel itself, as they do in y."""
    given = operands(directions=2, lam=False)
    given.gate = torch.ones_like(given.gate)
    given.gate[:, 1] = -1
    found = maps.propagation_map(given, (3, 4), ("down", "up"))
    assert found.sent["all"][3, 4] == 0
    assert found.sent["down"][3, 4] == found.sent["up"][3, 4] == 1


def test_spine_follows_a_shift():
    """Taps that only look to the left neighbour carry the impulse one place to the right a line."""
    given = operands(directions=1, lam=False, gate=False)
    given.logits = torch.full_like(given.logits, -60)
    given.logits[:, :, :, 0] = 60
    given.logits[..., 0][:, :, :, 1] = 60
    found = maps.propagation_map(given, (1, 2), ("down",))
    expected = [(1.0 + i, 2.0 + i) for i in range(6)]
    torch.testing.assert_close(torch.tensor(found.spines["down"]), torch.tensor(expected))
    assert found.coverage == pytest.approx(6 / 63)
    distances = torch.arange(6, dtype=torch.float64) * 2**0.5
    assert found.mean_distance == pytest.approx(distances.mean().item())


def test_maps_refuse_a_batch_and_a_pixel_off_the_grid():
    with pytest.raises(ValueError, match=r"pixel: expected .* inside 7 x 9, got \(7, 0\)"):
        maps.propagation_map(operands(), (7, 0))
    batch = SimpleNamespace(**{n: t.expand(2, *t.shape[1:]) for n, t in vars(operands()).items()})
    with pytest.raises(ValueError, match="operands: expected one image, got a batch of 2"):
        maps.propagation_map(batch, (0, 0))


def test_cost_measures_every_contender_and_says_what_stopped():
    found = cost.measure((8, 16), seconds_per_side=0.0)
    assert {(p.contender, p.side) for p in found.points} == {
        (name, side) for name in ("attention", "propagation", "proxy") for side in (8, 16)
    }
    assert all(p.seconds > 0 and p.error < cost.TOLERANCE and p.rounds == 3 for p in found.points)
    side, ratio = found.ratio("attention", "proxy")
    assert side == 16
    assert ratio == found.of("attention")[1].seconds / found.of("proxy")[1].seconds
    stopped = cost.measure((8, 4096), seconds_per_side=0.0, memory=10**9)
    assert [p.side for p in stopped.points] == [8, 8, 8]
    assert "attention" in stopped.stopped
    assert "above the limit of 0.9 GiB" in stopped.stopped["propagation"]
    slow = cost.measure((8, 16), seconds_per_side=0.0, longest_call=0.0)
    assert "above the limit of 0 s" in slow.stopped["attention"]


def test_cost_reports_no_time_for_a_wrong_result():
    honest = next(c for c in cost.CONTENDERS if c.name == "proxy")

    def prepare(side, generator):
        run = honest.prepare(side, generator)
        return cost.Run(lambda: 1.001 * run.call(), run.error)

    wrong = cost.Contender("wrong", "", prepare, honest.bytes, 1.0)
    with pytest.raises(cost.WrongResultError, match=r"wrong at 8 x 8: relative error 1\.0e-03"):
        cost.measure((8,), contenders=(wrong,))


def test_exponent_is_the_slope_in_pixels():
    points = [cost.Point("a", side, 1e-6 * side**3, (0, 0), 3, 0.0) for side in (16, 32, 64, 128)]
    points[0] = dataclasses.replace(points[0], seconds=1.0)  # overhead of small calls does not count
    assert cost.Cost(points).exponent("a") == pytest.approx(1.5)
    assert cost.as_json(cost.Cost(points[:1], labels={"a": "A"}))["exponents"]["a"] is None


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (2.5e-9, "2.5 ns"),
        (9.996e-4, "1 ms"),
        (1e-6, "1 µs"),
        (0.0123, "12.3 ms"),
        (3, "3 s"),
        (1234, "1234 s"),
    ],
)
def test_duration(seconds, text):
    assert charts.duration(seconds) == text


@pytest.mark.parametrize(("low", "high"), [(0, 2.31), (83.2, 100), (99.7, 100), (0, 0), (12, 100)])
def test_linear_axis_covers_its_range_with_few_ticks(low, high):
    axis = charts.linear_axis("", low, high, str)
    assert axis.low <= low
    assert axis.high >= high
    assert axis.high > axis.low
    assert 2 <= len(axis.ticks) <= 8


@pytest.mark.parametrize(("low", "high"), [(9.7, 98.6), (98.6, 98.6), (0, 0), (99.95, 100), (0, 100)])
def test_accuracy_axis_covers_its_range(low, high):
    axis = charts.accuracy_axis("", low, high)
    assert axis.low < axis.high
    for accuracy in (low, high):
        assert axis.low <= charts.error_decades(accuracy) <= axis.high
    assert [value for value, _ in axis.ticks] == sorted({value for value, _ in axis.ticks})


@pytest.mark.parametrize("epochs", [1, 2, 7, 20, 33, 300])
def test_epoch_axis_is_readable(epochs):
    labels = [value for value, _ in charts.epoch_axis(epochs).ticks]
    assert labels[0] == 1
    assert labels == sorted(set(labels))
    assert len(labels) <= 8


class Page(HTMLParser):
    """Open tags, everything a page would load, and its text."""

    VOID = frozenset({"meta", "link", "img", "br", "image"})

    def __init__(self, html):
        super().__init__()
        self.open, self.loads, self.tags, self.words = [], [], [], []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.loads += [value for name, value in attrs if name in ("src", "href", "xlink:href", "srcset")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)

    @property
    def text(self):
        return " ".join(self.words)


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """One quick run of the command: (exit code, folder)."""
    out = tmp_path_factory.mktemp("demo") / "report"
    return main(["demo", "--quick", "--seed", "3", "--out", str(out)]), out


def test_quick_run_leaves_report_numbers_and_checkpoints(quick):
    code, out = quick
    assert code == 0
    numbers = json.loads((out / "results.json").read_text())
    assert numbers["gate"] == {"required_percent": None, "reached": True}
    labels = torch.tensor(numbers["test_labels"])
    for key in ("gspn", "attention"):
        found = numbers["models"][key]
        confusion = torch.tensor(found["confusion"])
        guesses = torch.tensor(found["probabilities"]).argmax(1)
        assert found["test_top1"] == pytest.approx(100 * confusion.trace().item() / len(labels))
        assert found["test_top1"] == pytest.approx(100 * (guesses == labels).double().mean().item(), abs=0.6)
        assert [row["epoch"] for row in found["epochs"]] == [1]
        model, info = load_checkpoint(out / key)
        assert sum(p.numel() for p in model.parameters()) == found["parameters"]
        assert info.config.seed == 3
    sizes = [numbers["models"][key]["parameters"] for key in ("gspn", "attention")]
    assert sizes[0] == pytest.approx(sizes[1], rel=0.03)
    assert {point["side"] for point in numbers["cost"]["points"]} == {8, 16}
    layers = numbers["maps"]["layers"]
    assert len(layers) == 2
    assert all(len(layer["maps"]) == 3 for layer in layers)


def test_report_is_one_well_formed_page_that_loads_nothing(quick):
    html = (quick[1] / "report.html").read_text(encoding="utf-8")
    page = Page(html)
    assert page.open == []
    assert page.loads
    assert all(value.startswith("data:") for value in page.loads)
    assert not re.search(r"@import|url\(|https?:", html)
    assert "script" not in page.tags
    numbers = json.loads((quick[1] / "results.json").read_text())
    for key in ("gspn", "attention"):
        assert f"{numbers['models'][key]['test_top1']:.1f}%" in page.text
    assert numbers["about"]["Versions"] in page.text
    # Two charts of training, one of cost, two confusion matrices, two layers of three pixels of six tiles.
    assert page.tags.count("svg") == 3 + 2 + 2 * 3 * 6


def test_a_missed_gate_is_a_failure_that_says_so(quick, monkeypatch, capsys):
    """The trainings are those of the quick run; only what is asked of them is more than they reached."""
    from gspn2.demo import experiment

    def trained_before(contestant, config, on_event):
        model, _ = load_checkpoint(quick[1] / contestant.key / "last.safetensors")
        found = json.loads((quick[1] / "results.json").read_text())["models"][contestant.key]
        return experiment.Trained(
            key=contestant.key,
            label=found["label"],
            description=found["description"],
            parameters=found["parameters"],
            seconds=found["train_seconds"],
            epochs=found["epochs"],
            accuracy=found["test_top1"],
            confusion=found["confusion"],
            probabilities=torch.tensor(found["probabilities"]),
        ), model

    monkeypatch.setattr(experiment, "run", trained_before)
    assert main(["demo", "--quick", "--gate", "99.9", "--out", str(quick[1])]) == 1
    assert "expected at least 99.9%" in capsys.readouterr().err
    assert json.loads((quick[1] / "results.json").read_text())["gate"]["reached"] is False


def test_a_wrong_result_ends_the_demo_without_a_report(monkeypatch, tmp_path, capsys):
    from gspn2.demo import experiment

    def wrong(*args, **options):
        raise cost.WrongResultError("propagation is off")

    monkeypatch.setattr(experiment, "run", lambda *args: (None, None))
    monkeypatch.setattr(cost, "measure", wrong)
    assert main(["demo", "--quick", "--out", str(tmp_path / "report")]) == 1
    assert "propagation is off" in capsys.readouterr().err
    assert not (tmp_path / "report").exists()


def test_bad_arguments_are_usage_errors(tmp_path, capsys):
    assert main(["demo", "--epochs", "0"]) == 2
    (tmp_path / "file").write_text("")
    assert main(["demo", "--quick", "--out", str(tmp_path / "file")]) == 2
    assert "expected a folder" in capsys.readouterr().err


def test_maps_follow_what_the_model_runs():
    """Operands caught in a forward pass give the output that the mixers had in it."""
    from gspn2.demo.experiment import GSPN, captured_operands

    torch.manual_seed(0)
    model = timm.create_model(GSPN.model, num_classes=10, in_chans=1, **GSPN.model_args).eval()
    outputs = []
    for module in model.modules():
        if isinstance(module, Mixer):
            module.register_forward_hook(lambda module, args, output: outputs.append(output))
    found = captured_operands(model, torch.randn(1, 1, 16, 16))
    assert len(found) == 6
    for (_, mixer, given), output in zip(found, outputs, strict=True):
        y = gspn2.propagate(*given, directions=mixer.directions, chunk=mixer.chunk)
        torch.testing.assert_close(mixer.from_proxy(y), output)


def test_chosen_pixels_lie_on_and_off_the_ink():
    from gspn2.demo.experiment import chosen_pixels

    image = torch.zeros(32, 32)
    image[4:28, 14:18] = 1
    pixels = chosen_pixels(image, 16, 16)
    upper, lower, empty = pixels.values()
    assert upper[0] < 8 <= lower[0]
    assert upper[1] in (7, 8)
    assert lower[1] in (7, 8)
    assert image[2 * empty[0], 2 * empty[1]] == 0
