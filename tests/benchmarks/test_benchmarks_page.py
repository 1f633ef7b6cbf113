"""The benchmark page: a row for each result, failed scripts and missing packages; all ways to compute scores agree."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import metrics, page, procedures, tables
from benchmarks.page import Outcome
from benchmarks.tables import BENCHMARKS, Benchmark, Row
from utils.evaluation import Evaluator, all_decisions, evaluate
from utils.predict import PredictOptions

RECORDED: dict[str, dict[str, Any]] = {
    "rankdice": {
        "maps": {
            "1x2x8x8": {
                "shape": [1, 2, 8, 8],
                "seconds": {
                    "exact dice": [0.002, 0.001, 0.004],
                    "exact iou": [0.003],
                    "torch.argmax": [0.001],
                    "one read (sum)": [0.0001],
                    "softmax": [0.0005],
                    "torch.sort": [0.002],
                    "our rma dice": [0.008],
                    "our ba dice": [0.016],
                    "rankseg RMA dice": [0.004],
                    "rankseg RMA iou": [0.006],
                    "rankseg BA dice": [0.032],
                },
                "lost": {name: {"mean": 2e-8} for name in ("rankseg RMA dice", "rankseg BA dice")},
            }
        }
    },
    "procedures": {
        "label maps": {"1x3x8x8": {"ours": [0.002], "argmax": [0.001]}},
        "scoring": {"max, 1x3x8x8": {"ours": [0.001, 0.003], "plain loop": [0.004]}},
        "fit": {"40x3x8x8": {"ours": [0.004], "temperature scaling, L-BFGS": [0.002]}},
    },
    "data": {
        "images_per_second": {
            "ours": {"files": [500.0, 100.0, 900.0], "memory": [1000.0]},
            "ours, normalized": {"files": [250.0], "memory": [500.0]},
            "separate": {"files": [125.0], "memory": [200.0]},
            "torchvision": {"files": [50.0], "memory": [2000.0]},
        }
    },
    "training": {
        "title": "UNet width 4",
        "iteration": {
            "ours": {"milliseconds": 105.0},
            "bare": {"milliseconds": 100.0},
            "predecessor": {"milliseconds": 210.0},
        },
    },
    "metrics": {
        "maps": {
            "labels 2x3x8x8": {
                "gives": {"ours": ["Mean_Dice"], "loop": ["Mean_Dice", "Mean_IoU"]},
                "seconds": {"ours": [0.001, 0.002, 0.003], "loop": [0.001]},
            }
        }
    },
    "inference": {
        "rows": [
            {"network": "ENet", "mode": "multiscale", "image": "8 x 8", "older_s": 0.4, "network_s": 0.3, "ours_s": 0.2}
        ]
    },
}
KNOWN = {"processor": "Abacus 3000", "rankseg": "0.0.8", "torchmetrics": "not installed", "scipy": "1.11"}


def rows_of(name: str) -> list[Row]:
    return BENCHMARKS[name].rows(RECORDED[name])


def outcome(name: str, **options: Any) -> Outcome:
    return Outcome(f"python -m benchmarks.{name} --quick", KNOWN, "2026-01-02", **options)


def script(folder: Path, text: str, name: str = "training") -> Benchmark:
    """Return a benchmark that runs a few lines instead of the script of that name; ``out`` is its JSON file."""
    original = BENCHMARKS[name]

    class Fake(Benchmark):
        def command(self, full: bool, device: str, out: Path | None = None) -> list[str]:
            return ["-c", f"from pathlib import Path; out = Path({str(out)!r})\n{text}"] if out else ["-m", "fake"]

    return Fake(original.name, original.title, original.about, original.rows)


# -- rows ----------------------------------------------------------------------------------------------------------


def test_exact_iou_and_the_approximations_meet_their_own_peers() -> None:
    found = {(row.case, row.peer): (row.ours, row.theirs) for row in rows_of("rankdice")}
    assert found == {
        ("1x2x8x8, exact dice", "torch.argmax"): (2.0, 1.0),
        ("1x2x8x8, exact dice", "rankseg RMA dice"): (2.0, 4.0),
        ("1x2x8x8, exact iou", "rankseg RMA iou"): (3.0, 6.0),
        ("1x2x8x8, exact dice", "rankseg BA dice"): (2.0, 32.0),
        ('1x2x8x8, our `solver="rma"`', "rankseg RMA dice"): (8.0, 4.0),
        ('1x2x8x8, our `solver="ba"`', "rankseg BA dice"): (16.0, 32.0),
        ("1x2x8x8, for scale", "one read (sum)"): (2.0, 0.1),
        ("1x2x8x8, for scale", "softmax"): (2.0, 0.5),
        ("1x2x8x8, for scale", "torch.sort"): (2.0, 2.0),
    }
    notes = {row.peer: row.note for row in rows_of("rankdice")}
    assert notes["rankseg BA dice"] == "2e-08"
    assert notes["torch.argmax"] == ""


def test_procedures_are_compared_from_end_to_end() -> None:
    assert rows_of("procedures") == [
        Row("label map 1x3x8x8", "argmax", 2.0, 1.0),
        Row("test.py max, 1x3x8x8", "plain loop", 2.0, 4.0),
        Row("fit of 40x3x8x8", "temperature scaling, L-BFGS", 4.0, 2.0),
    ]


def test_the_plain_loop_scores_as_the_evaluation_does() -> None:
    pytest.importorskip("torchmetrics")
    network, batches = procedures.guided((3, 4, 32, 40), "cpu")
    decisions = all_decisions(PredictOptions())
    found = evaluate(Evaluator(network), batches, {name: decisions[name] for name in ("T", "max")}).metrics
    for name, decide in (("T", lambda p: p > 0.5), ("max", lambda p: p.argmax(1))):
        assert procedures.plain(network, batches, decide, 4) == pytest.approx(found[name].compute()["Mean_Dice"])
    assert all(seconds["ours"] for seconds in procedures.scoring((1, 3, 32, 32), "cpu", 1).values())
    assert procedures.label_maps((1, 3, 16, 16), "cpu", 1)["argmax"]
    assert procedures.fitting((10, 3, 8, 8), 1)["ours"]


def test_without_rankseg_its_rows_are_left_out() -> None:
    result = json.loads(json.dumps(RECORDED["rankdice"]))
    times = result["maps"]["1x2x8x8"]["seconds"]
    for name in [name for name in times if "rankseg" in name]:
        del times[name]
    assert [row.peer for row in tables.rankdice_rows(result)] == ["torch.argmax", *tables.SCALE]


def test_rates_become_milliseconds_per_sample() -> None:
    found = [(row.ours, row.theirs, row.ratio) for row in rows_of("data")]
    assert found[0] == pytest.approx((2.0, 8.0, 4.0))
    assert found[2] == pytest.approx((4.0, 8.0, 2.0))
    assert found[-1] == pytest.approx((2.0, 0.5, 0.25))
    assert len(found) == 8


def test_training_shows_the_loop_that_is_faster() -> None:
    bare, predecessor = rows_of("training")
    assert bare.ratio == pytest.approx(100 / 105)
    assert predecessor.ratio == pytest.approx(2)


def test_scores_name_what_the_peer_computes() -> None:
    (row,) = rows_of("metrics")
    assert row == Row("labels 2x3x8x8", "loop over images and classes", 2.0, 1.0, "`Mean_Dice`, `Mean_IoU`")


def test_inference_reports_the_share_of_the_network() -> None:
    (row,) = rows_of("inference")
    assert (row.case, row.ours, row.theirs, row.note) == ("ENet, multiscale, 8 x 8", 200.0, 400.0, "300")


@pytest.mark.parametrize(("value", "text"), [(0.02345, "0.0234"), (1.0, "1"), (99.96, "100"), (12345.6, "12346")])
def test_numbers_have_three_digits_and_no_exponent(value: float, text: str) -> None:
    assert tables.number(value) == text


# -- the page ------------------------------------------------------------------------------------------------------


def test_the_page_contains_machine_tables_failures_and_missing_peers(tmp_path: Path) -> None:
    outcomes: dict[str, Outcome | None] = {name: outcome(name, result=RECORDED[name]) for name in RECORDED}
    outcomes["data"] = outcome("data", error=f"it ended with status 1: {page.ROOT}/x.py: no `cv2`")
    outcomes["inference"] = None
    text = page.page(outcomes, KNOWN, full=False, images=tmp_path)
    assert "| processor | Abacus 3000 |" in text
    assert re.findall(r"^## (.+)$", text, re.MULTILINE) == [one.title for one in BENCHMARKS.values()]
    assert "| UNet width 4 | bare loop: model, loss, backward, step | 105 | 100 | 0.952 |" in text
    assert "**Failed:** `python -m benchmarks.data --quick`: it ended with status 1: ./x.py: no 'cv2'" in text
    assert "The rows of torchmetrics are missing" in text
    assert "Package rankseg" not in text
    assert "**Not measured**" in text
    assert text.count("2026-01-02") == 4
    for line in text.splitlines():
        if line.startswith("| ") and "---" not in line and line != "| | |":
            assert line.count("|") in (3, 6, 7)


@pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="matplotlib is not installed")
def test_the_page_shows_the_plots_it_draws(tmp_path: Path) -> None:
    text = page.page({"metrics": outcome("metrics", result=RECORDED["metrics"])}, KNOWN, full=True, images=tmp_path)
    assert "](images/benchmarks-metrics.png)" in text
    assert (tmp_path / "benchmarks-metrics.png").read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_the_page_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr(page, "version_of", lambda package: "not installed")
    text = page.page({"metrics": outcome("metrics", result=RECORDED["metrics"])}, KNOWN, full=False, images=tmp_path)
    assert "There are no plots" in " ".join(text.split())
    assert "![" not in text
    assert list(tmp_path.iterdir()) == []


def test_the_machine_is_described_without_its_name() -> None:
    import platform

    known = page.facts()
    assert all(known.values())
    assert torch.__version__.startswith(known["torch"])
    assert {"processor", "cores", "torch threads", "memory", "GPU", "system", "rankseg", "torchmetrics"} <= set(known)
    assert platform.node() not in known.values()


# -- running -------------------------------------------------------------------------------------------------------


def test_a_run_is_shown_and_kept_for_a_later_page(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    good = script(tmp_path, f"print('at work'); out.write_text({json.dumps(RECORDED['training'])!r})")
    found = page.measure(good, False, "cpu", KNOWN, tmp_path)
    assert found.result == RECORDED["training"]
    assert not found.error
    assert "at work" in capfd.readouterr().out
    assert page.earlier(good, False, "cpu", KNOWN, tmp_path) == found
    assert page.earlier(good, False, "cpu", KNOWN | {"torch": "other"}, tmp_path) is None
    assert page.earlier(BENCHMARKS["training"], True, "cpu", KNOWN, tmp_path) is None
    (tmp_path / "training.run.json").write_text('{"of": "another time"}')
    assert page.earlier(good, False, "cpu", KNOWN, tmp_path) is None


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("raise ImportError('no rankseg here')", "status 1: ImportError: no rankseg here"),
        ("raise SystemExit(3)", "status 3: no message"),
        ("pass", "cannot read its results: FileNotFoundError"),
        ("out.write_text('{}')", "cannot read its results: KeyError"),
    ],
)
def test_a_failure_has_its_reason_and_no_old_numbers(tmp_path: Path, text: str, reason: str) -> None:
    (tmp_path / "training.json").write_text(json.dumps(RECORDED["training"]))
    found = page.measure(script(tmp_path, text), False, "cpu", KNOWN, tmp_path)
    assert reason in found.error


def test_one_failure_is_named_and_the_page_written_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "docs" / "benchmarks.md"
    target.parent.mkdir()
    target.write_text("old")
    seen = []

    def fake(one: Benchmark, full: bool, device: str, known: dict[str, str]) -> Outcome:
        assert target.read_text() == "old"  # until everything is measured
        seen.append(one.name)
        return outcome(one.name, error="boom") if one.name == "data" else outcome(one.name, result=RECORDED[one.name])

    monkeypatch.setattr(page, "ROOT", tmp_path)
    monkeypatch.setattr(page, "PAGE", target)
    monkeypatch.setattr(page, "measure", fake)
    monkeypatch.setattr(page, "earlier", lambda *_: None)
    monkeypatch.setattr(page, "facts", lambda: KNOWN)
    monkeypatch.setattr(page, "draw", lambda _: None)
    assert page.main([]) == 1
    assert seen == list(BENCHMARKS)
    assert target.read_text().startswith("# Benchmarks\n")
    assert "**Failed:**" in target.read_text()
    assert [p.name for p in target.parent.iterdir()] == ["benchmarks.md"]
    assert "failed: data: boom" in capfd.readouterr().err

    target.write_text("old")
    assert page.main(["--only", "training"]) == 0
    assert target.read_text().count("**Not measured**") == len(BENCHMARKS) - 1


def test_commands_fit_the_form() -> None:
    for one in BENCHMARKS.values():
        short, full = one.command(False, "cpu"), one.command(True, "cpu", Path("x.json"))
        assert short[:2] == ["-m", f"benchmarks.{one.name}"]
        assert importlib.util.find_spec(short[1]) is not None
        assert ("--quick" in short, "--quick" in full) == (True, False)
        assert full[-2:] == ["--json", "x.json"]


def test_make_bench_installs_the_extra_of_the_project() -> None:
    required = (page.ROOT / "benchmarks" / "requirements.txt").read_text(encoding="utf-8")
    project = (page.ROOT / "pyproject.toml").read_text(encoding="utf-8")
    (extra,) = re.findall(r"^benchmarks = \[(.*?)\]", project, re.MULTILINE)
    installed = {re.split(r"[>=<]", line)[0] for line in required.splitlines()}
    assert (
        set(re.findall(r'"([\w-]+)', extra)) | {peer for one in BENCHMARKS.values() for peer in one.peers} <= installed
    )


# -- the benchmark of scores ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "shape"), [("labels", (2, 3, 64, 64)), ("masks", (2, 3, 64, 64))])
def test_all_ways_to_scores_agree(kind: str, shape: tuple[int, int, int, int]) -> None:
    predicted, target = metrics.batch(kind, shape, "cpu")
    assert (target == metrics.IGNORED).any()
    ways = metrics.ways_for(kind, "cpu")
    assert len(ways) == (5 if kind == "labels" else 3)
    found = {name: way(predicted, target, shape[1]) for name, way in ways.items()}
    assert 0.2 < found["ours"]["Mean_Dice"] < 0.99
    assert metrics.check(found) < 1e-6
    assert all(found[name] for name in ways)


def test_ways_that_disagree_stop_the_benchmark() -> None:
    with pytest.raises(ValueError, match="Mean_Dice: ours is 0.5, loop gives 0.6"):
        metrics.check({"ours": {"Mean_Dice": 0.5}, "loop": {"Mean_Dice": 0.6}})
    with pytest.raises(ValueError, match="Mean_Dice"):
        metrics.check({"ours": {"Mean_Dice": 0.5}, "loop": {"Mean_Dice": float("nan")}})


def test_the_numbers_of_the_scores_become_rows() -> None:
    result = metrics.compare("labels", (1, 3, 64, 64), 1, "cpu")
    rows = tables.metrics_rows(json.loads(json.dumps({"maps": {"tiny": result}})))
    assert [row.peer for row in rows][:2] == list(tables.SCORES.values())
    assert rows[0].note == "`Dataset_mIoU`"
    assert all(row.ours > 0 and row.theirs > 0 for row in rows)
