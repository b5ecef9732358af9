"""Reports of real record files: every number where it belongs, and nothing in the page that could run."""

import base64
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from helpers.synthetic_run import DOMAINS, Page, make_run, phase_done
from megashear.config.load import load_config, save_config
from megashear.config.presets import resolve_shape
from megashear.errors import DataError
from megashear.evaluation.losses import save_sequences
from megashear.masks.unit_scores import Scores, save_scores
from megashear.plots.metric_series import Phase
from megashear.report.compare_runs import difference_of, difference_row
from megashear.report.run_cost import costs, curves, distilled_steps, live_steps, trained_tokens
from megashear.report.run_record import read_run
from megashear.report.run_report import write_report
from megashear.train.metrics import SCORES_NAME

pytestmark = pytest.mark.medium  # draws many pictures

pytestmark = pytest.mark.usefixtures("small_pictures")


def test_a_whole_run(tmp_path: Path) -> None:
    run = make_run(tmp_path / "mine")
    assert write_report(run) == run / "report.html"
    page = Page(run / "report.html")
    text = " ".join(page.cells)
    for heading in ("Held-out losses", "What was kept", "Cost", "Mixture", "Pictures"):
        assert heading in page.cells
    assert "What is missing" not in page.cells and "Comparison" not in page.cells
    assert "6.74 B parameters pruned to 1.35 B (20.0%)." in text
    at = page.cells.index(DOMAINS[0])
    assert page.cells[at + 1 : at + 7] == [
        *("1.5000 +- 0.0100", f"{math.exp(1.5):.2f}", "2.4000 +- 0.0100", f"{math.exp(2.4):.2f}"),
        *("1.8000 +- 0.0100", f"{math.exp(1.8):.2f}"),
    ]
    at = page.cells.index("head")
    assert page.cells[at + 1 : at + 5] == ["15 of 32", "15", "3", "0.125"]
    assert page.cells[page.cells.index("1.00 M") + 5 :][:2] == ["2:00", "25.0%"]
    pictures = [value for name, value in page.attributes if name == "src"]
    assert len(pictures) == 9  # those of `megashear plot`, and the maps
    for source in pictures:
        assert source is not None
        assert base64.b64decode(source.removeprefix("data:image/png;base64,")).startswith(b"\x89PNG")


def test_the_same_records_give_the_same_file_and_no_temporary_one(tmp_path: Path) -> None:
    run = make_run(tmp_path / "mine", finished=False)
    for name in ("a", "b"):
        write_report(run, None, tmp_path / "out" / f"{name}.html")
    assert (tmp_path / "out" / "a.html").read_bytes() == (tmp_path / "out" / "b.html").read_bytes()
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a.html", "b.html"]


def test_nothing_from_a_run_folder_can_run_or_load(tmp_path: Path) -> None:
    """Names with markup in them, of domains, granularities and the folder itself, are shown as text."""
    bad = "<script>alert(1)</script>"
    names = (bad, '"><img src=x onerror=alert(1)>', "</title><iframe src=//a>", "$\\nothing{$ &amp;", *DOMAINS[4:])
    run = make_run(tmp_path / "<b onclick=1>mine", names=names)
    record = json.loads((run / "finalize" / "done.json").read_text())
    record["borderline"][0]["granularity"] = bad
    (run / "finalize" / "done.json").write_text(json.dumps(record))
    page = Page(write_report(run, run, tmp_path / "report.html"))
    allowed = (
        "html head meta title style body section h1 h2 p ul li table caption thead tbody tr th td figure img figcaption"
    )
    assert set(page.tags) <= set(allowed.split())
    assert {name for name, _ in page.attributes} <= {"lang", "charset", "name", "http-equiv", "content", "src", "alt"}
    assert all(value.startswith("data:image/png;base64,") for name, value in page.attributes if name == "src")
    assert bad in page.cells and names[1] in page.cells and names[3] in page.cells


def test_masked_losses_stand_until_the_cut(tmp_path: Path) -> None:
    run = make_run(tmp_path / "mine")
    assert list(read_run(run).losses) == ["source", "pruned", "final"]
    for phase in ("finalize", "pretrain"):
        (run / phase / "done.json").unlink()
    found = read_run(run).losses
    assert list(found)[:2] == ["source", "masked"] and found["masked"][DOMAINS[0]] == (2.5, 0.01)


def test_cost_by_hand(tmp_path: Path) -> None:
    """Tokens times 6 a weight and half the attention; pruning by the live share of every one of its steps."""
    run = read_run(make_run(tmp_path / "mine"))
    config = load_config(tmp_path / "mine" / "config.yaml")
    source = resolve_shape(config.source.shape, None)
    target = resolve_shape(config.target, source)
    live = np.mean(1 - 0.59 * np.minimum(1, np.arange(1, 41) / 8))
    prune, pretrain = costs(run)
    assert prune.live == pytest.approx(live) and 0.4 < live < 0.5
    assert prune.flops == pytest.approx(1e6 * source.flops_per_token(4096) * live)
    assert prune.source_flops == 1e6 * source.flops_per_token(4096)
    assert pretrain.flops == 3e6 * target.flops_per_token(4096)
    assert pretrain.source_flops == 3e6 * source.flops_per_token(4096)
    assert prune.teacher_flops == pretrain.teacher_flops == 0
    first, second = curves(run, list(DOMAINS))
    assert first.tokens.tolist() == [5e5, 1e6] and second.tokens.tolist() == [1e6, 2.5e6, 4e6]
    assert first.flops[-1] == second.flops[0] == pytest.approx(prune.flops)
    assert second.flops[-1] == pytest.approx(prune.flops + pretrain.flops)
    path = tmp_path / "mine/prune/done.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"calibration_tokens": 5e5, "calibration_flops": 7e15}))
    again = read_run(tmp_path / "mine")
    assert [cost.phase for cost in costs(again)] == ["calibration", "prune", "pretrain"]
    assert trained_tokens(costs(again)) == 4e6
    third, fourth = curves(again, list(DOMAINS))
    assert np.allclose(third.flops, first.flops + 7e15, rtol=1e-12) and third.tokens.tolist() == first.tokens.tolist()
    assert np.allclose(fourth.flops, second.flops + 7e15, rtol=1e-12)
    assert first.loss[0] == np.mean(list(run.phase("prune").records["eval"][0]["loss"].values()))


def test_a_teacher_costs_a_third_of_a_step_of_the_source(tmp_path: Path) -> None:
    """For the steps that had a teacher: 5 of the first 10, and none of the others."""
    folder = make_run(tmp_path / "mine")
    path = folder / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for one in lines:
        if one["phase"] == "pretrain" and one["kind"] == "train":
            one |= {"teacher_flops": 0.8, "distilled_steps": min(one["step"], 5)}
    path.write_text("".join(json.dumps(one) + "\n" for one in lines))
    run = read_run(folder)
    prune, pretrain = costs(run)
    assert prune.teacher_flops == 0
    assert pretrain.teacher_flops == pytest.approx(0.8 * pretrain.flops * 5 / run.phase("pretrain").last_step())
    _, curve = curves(run, list(DOMAINS))
    assert curve.flops[-1] == pytest.approx(prune.flops + pretrain.flops + pretrain.teacher_flops)


def test_taught_steps_between_and_beyond_records() -> None:
    phase = Phase("pretrain", {"train": [{"step": 10, "distilled_steps": 10}, {"step": 20, "distilled_steps": 13}]})
    assert distilled_steps(phase, np.array([0, 4, 10, 20, 30])).tolist() == [0, 4, 10, 13, 13]
    assert distilled_steps(Phase("pretrain", {"train": [{"step": 7}]}), np.array([3])).tolist() == [3]


def test_live_steps_are_those_recorded_between_and_beyond_records() -> None:
    pairs = ((10, 0.5, 9.0), (20, 0.5, 14.0))
    phase = Phase("prune", {"mask": [{"step": n, "live_flops": one, "live_steps": all_} for n, one, all_ in pairs]})
    assert live_steps(phase, np.array([0, 5, 10, 15, 20, 30])).tolist() == [0, 4.5, 9, 11.5, 14, 19]
    unmeasured = [{"step": 10, "live_flops": None, "live_steps": None}]
    assert live_steps(Phase("prune", {"mask": unmeasured}), np.array([4, 10, 12])).tolist() == [4, 10, 12]
    assert live_steps(Phase("prune", {}), np.array([7])).tolist() == [7]


def test_live_steps_of_older_records_are_the_area_under_their_shares() -> None:
    """A record's share is that of its own step: masks that close evenly from 1 to 0.5 needed 0.75 on the way."""
    phase = Phase("prune", {"mask": [{"step": step, "live_flops": 0.5} for step in (10, 20)]})
    assert live_steps(phase, np.array([0, 5, 10, 15, 20, 30])).tolist() == [0, 3.75, 7.5, 10, 12.5, 17.5]
    phase.records["mask"].append({"step": 30, "live_flops": None})  # not measured: counted whole
    assert live_steps(phase, np.array([30, 40])).tolist() == [20, 30]
    phase.records["mask"].append({"step": 40, "live_flops": 0.5, "live_steps": 25.0})  # the run went on with newer code
    assert live_steps(phase, np.array([20, 40, 50])).tolist() == [12.5, 25, 30]


def test_a_run_that_goes_on(tmp_path: Path) -> None:
    page = Page(write_report(make_run(tmp_path / "mine", finished=False)))
    for phase in ("prune", "finalize", "pretrain"):
        assert f"The phase {phase} has not finished." in page.cells
    assert "prune, step 40" in page.cells and "final" not in page.cells


def test_while_pruning_goes_on_calibration_costs_what_it_will_record(tmp_path: Path) -> None:
    """Basis and scores by one criterion: with a backward pass, four forward passes in all; no time is known of them."""
    keys = ["prune.importance={criterion: taylor_weight, batches: 4}", "prune.basis=principal"]
    run = make_run(tmp_path / "mine", keys, finished=False)
    config = load_config(run / "config.yaml")
    tokens = 4 * config.prune.batch.global_batch * 4096
    flops = tokens * 4 / 3 * resolve_shape(config.source.shape, None).flops_per_token(4096)
    calibration, prune = costs(read_run(run))
    assert (calibration.phase, calibration.tokens) == ("calibration", tokens)
    assert calibration.flops == pytest.approx(flops) and math.isnan(calibration.seconds)
    assert curves(read_run(run), list(DOMAINS))[0].flops[-1] == pytest.approx(flops + prune.flops)
    cells = Page(write_report(run)).cells
    assert cells[cells.index("calibration") + 6 :][:2] == ["not known", "not known"]
    phase_done(run, "prune", DOMAINS, 2.5, tokens=1_000_000)  # an older record, of a run without calibration
    assert [cost.phase for cost in costs(read_run(run))] == ["prune"]


def test_pretraining_alone_and_no_metrics_yet(tmp_path: Path) -> None:
    run = tmp_path / "mine"
    run.mkdir()
    (run / "identity.json").write_text("{}")
    keys = ["run.phases=[pretrain]", "source.shape.preset=sheared-1.3b", "data.folder=data"]
    save_config(load_config(None, keys), run / "config.yaml")
    page = Page(write_report(run))
    assert "A model of 1.35 B parameters, trained in its own shape." in page.cells
    assert "Pictures" not in page.cells and "The phase pretrain has not finished." in page.cells


def test_scores_of_importance_are_shown_where_units_were_scored(tmp_path: Path) -> None:
    run = make_run(tmp_path / "mine")
    said = "The scores that masks started from"
    assert not any(said in cell for cell in Page(write_report(run)).cells)
    sizes = {"hidden": (40,), "group": (6, 4), "intermediate": (6, 24), "layer": (6,)}
    units = {name: torch.rand(size) for name, size in sizes.items()}
    errors = {name: value / 10 for name, value in units.items()}
    save_scores(run / SCORES_NAME, Scores(units, errors, dict.fromkeys(units, "fisher")), {})
    assert any(said in cell for cell in Page(write_report(run)).cells)


def test_without_its_run_file_a_run_has_no_flops(tmp_path: Path) -> None:
    run = make_run(tmp_path / "mine")
    (run / "config.yaml").write_text("prune: {no_such_key: 1}")
    text = " ".join(Page(write_report(run)).cells)
    assert "The run file cannot be read" in text and "no_such_key" in text and "not known" in text


def test_two_runs(tmp_path: Path) -> None:
    first, second = make_run(tmp_path / "mine"), make_run(tmp_path / "yours", final=1.7)
    page = Page(write_report(first, second, tmp_path / "both.html"))
    at = page.cells.index("mine (final)")
    assert page.cells[at + 1 : at + 4] == ["yours (final)", "difference", "beyond 2 standard errors"]
    assert page.cells[at + 4 :][:5] == [
        DOMAINS[0],
        "1.8000 +- 0.0100",
        "1.7000 +- 0.0100",
        "-0.1000 +- 0.0141",
        "yes, lower",
    ]
    assert len([value for name, value in page.attributes if name == "src"]) == 10


def test_domains_of_one_of_two_runs_are_named(tmp_path: Path) -> None:
    first = make_run(tmp_path / "mine")
    second = make_run(tmp_path / "yours", names=(*DOMAINS[:2], *"vwxyz"))
    cells = Page(write_report(first, second)).cells
    assert f"Only mine was evaluated on {', '.join(DOMAINS[2:])}." in cells
    assert "Only yours was evaluated on v, w, x, y, z." in cells
    start = cells.index("mine (final)")
    assert "mean of 2" in cells[start:] and DOMAINS[2] not in cells[start:]
    page = Page(write_report(first, make_run(tmp_path / "others", names=tuple("abcdefg"))))
    assert f"Only mine was evaluated on {', '.join(DOMAINS)}." in page.cells
    assert "The runs share no evaluated domain; losses are not compared." in page.cells
    assert "mine (final)" not in page.cells and not any("second less the first" in cell for cell in page.cells)


@pytest.mark.parametrize(
    "mine, other, said",
    [
        ((2.0, 0.03), (2.09, 0.04), "no"),
        ((2.0, 0.03), (2.11, 0.04), "yes, higher"),
        ((2.0, 0.03), (1.89, 0.04), "yes, lower"),
        ((2.0, math.nan), (1.0, 0.04), "not known"),
        ((math.nan, 0.03), (1.0, 0.04), "not known"),
    ],
)
def test_beyond_two_standard_errors_of_the_difference(mine, other, said) -> None:
    """3, 4 and 5: the error of the difference is 0.05."""
    assert difference_row("web", mine, other, difference_of(mine, other, None, None))[-1] == said


def test_a_difference_without_an_error_stands_alone() -> None:
    mine, other = (2.0, math.nan), (1.9, math.nan)
    row = difference_row("web", mine, other, difference_of(mine, other, None, None))
    assert row == ["web", "2.0000", "1.9000", "-0.1000", "not known"]


def test_two_runs_over_the_same_sequences_are_compared_by_pairs(tmp_path: Path) -> None:
    first, second = make_run(tmp_path / "mine"), make_run(tmp_path / "yours", final=1.7)
    noise_N = np.array([-1.0, 1.0, -0.5, 0.5])
    for run, loss, off in ((first, 1.8, 0.0), (second, 1.7, 0.01)):
        off_N = np.array([-off, off, off, -off])
        texts = dict.fromkeys(DOMAINS, "same")
        losses = {name: loss + 0.1 * number + noise_N + off_N for number, name in enumerate(DOMAINS)}
        record = json.loads((run / "pretrain/done.json").read_text())
        record["losses"] = {name: float(loss_N.mean()) for name, loss_N in losses.items()}
        (run / "pretrain/done.json").write_text(json.dumps(record))
        save_sequences(run / "pretrain", losses, texts)
    cells = Page(write_report(first, second)).cells
    error = 0.01 * math.sqrt(4 / 3 / 4)  # of four differences that are 0.01 off their mean
    assert cells[cells.index("mine (final)") + 7 :][:2] == [f"-0.1000 +- {error:.4f}", "yes, lower"]
    assert any("sequence by sequence;" in cell for cell in cells)
    save_sequences(second / "pretrain", losses, texts | {DOMAINS[0]: "other"})
    cells = Page(write_report(first, second)).cells
    said = f"evaluated on other sequences ({DOMAINS[0]})"
    assert any(said in cell for cell in cells)
    assert cells[cells.index("mine (final)") + 7] == "-0.1000 +- 0.0141"
    assert any("where both runs read the same text" in cell for cell in cells)
    shifted = {name: loss_N + 0.5 for name, loss_N in losses.items()}  # of another evaluation than the recorded losses
    save_sequences(second / "pretrain", shifted, texts)
    cells = Page(write_report(first, second)).cells
    assert any("drawn anew" in cell for cell in cells)
    (second / "pretrain/heldout.json").write_text('{"cc": {"text": 3}}')
    with pytest.raises(DataError, match=r"heldout\.json: cannot be read .*remove it"):
        write_report(first, second)


def test_what_is_no_run_or_damaged_is_one_message(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no identity\.json and no metrics\.jsonl"):
        write_report(tmp_path)
    run = make_run(tmp_path / "mine")
    done = run / "pretrain" / "done.json"
    for content in ("{", "[]", '{"losses": 3}', '{"losses": {"a": "x"}, "errors": {}}'):
        done.write_text(content)
        with pytest.raises(DataError, match="mine"):
            write_report(run)
    assert not (run / "report.html").exists()
