"""Checks across sections: every rule is broken once, and all problems come at once."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megashear.config import config_keys as keys
from megashear.config.load import load_config
from megashear.config.presets import PRESETS
from megashear.config.schema import Config
from megashear.config.training_schema import GRANULARITIES, BatchConfig
from megashear.errors import ConfigError, DataError
from megashear.planning.check import check, examine
from megashear.planning.dataset_plan import Dataset, Domain, evaluation_share, read_dataset
from megashear.planning.plan_tables import render

GOOD = """
source: {shape: {preset: llama2-7b}, folder: nowhere/llama2-7b}
target: {preset: sheared-2.7b}
data: {folder: DATA, sequence_length: 128}
parallel: {world_size: 4, tensor: 2}
"""


def dataset(folder: Path, **tokens: int) -> Path:
    """A dataset folder's manifest, as far as checks read it."""
    domains = {
        name: {"train": {"tokens": count, "documents": 9}, "heldout": {"tokens": 129 * 64, "documents": 9}}
        for name, count in (tokens or {"cc": 10**12, "book": 10**12}).items()
    }
    folder.mkdir(exist_ok=True)
    content = {"domains": domains, "tokenizer": {"vocab_size": 32000}, "files": {}}
    (folder / "manifest.json").write_text(json.dumps(content))
    return folder


def config(folder: Path, *overrides: str, text: str = GOOD) -> Config:
    (folder / "run.yaml").write_text(text.replace("DATA", str(folder / "data")))
    return load_config(folder / "run.yaml", list(overrides))


def problems(folder: Path, *overrides: str, world: int | None = None, text: str = GOOD) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        check(config(folder, *overrides, text=text), None, world)
    return caught.value.problems


def test_a_good_run_file_passes_and_says_what_was_not_checked(tmp_path: Path) -> None:
    report = check(config(tmp_path), None, None)
    assert report.source == PRESETS["llama2-7b"]
    assert report.target is not None
    assert report.target.parameters() == 2_701_560_320
    assert report.warnings == []
    assert [note.split(":")[0] for note in report.not_checked] == ["domains and tokens", "weights"]
    assert report.memory.keys() == {"prune", "pretrain"}
    dataset(tmp_path / "data")
    assert [note.split(":")[0] for note in check(config(tmp_path), None, 4).not_checked] == ["weights"]
    unknown = check(config(tmp_path, "parallel.world_size=null"), None, None)
    assert unknown.not_checked[0].startswith("batches and memory")
    assert unknown.memory == {}


def test_memory_of_one_shot_pruning_is_estimated(tmp_path: Path) -> None:
    fits, cuts, magnitude = (
        check(config(tmp_path, "prune.method=one_shot", *keys), None, 4)
        for keys in ([], ["prune.refit=0"], ["prune.refit=0", "prune.importance.criterion=magnitude"])
    )
    assert fits.memory.keys() == {"prune", "pretrain"}
    weights = [report.memory["prune"][0].weights for report in (fits, cuts, magnitude)]
    assert weights[0] == 2 * weights[1] == 2 * weights[2] >= 2 * PRESETS["llama2-7b"].parameters()
    assert cuts.memory["prune"][0].total >= magnitude.memory["prune"][0].total
    assert re.search(r"^prune +6\.74 B|^prune +3\.37 B", render(config(tmp_path), fits), re.MULTILINE)


def test_the_target_counts_where_the_run_folder_was_pruned_before(tmp_path: Path) -> None:
    keys = ["run.phases=[pretrain]", f"run.folder={tmp_path / 'run'}"]
    assert check(config(tmp_path, *keys), None, 4).target is None
    (tmp_path / "run/finalize").mkdir(parents=True)
    (tmp_path / "run/finalize/done.json").write_text("{}")
    found = check(config(tmp_path, *keys), None, 4)
    assert found.target is not None and found.memory["pretrain"][0].parameters < found.target.parameters()


def test_shape_of_the_folder_counts(tmp_path: Path) -> None:
    found = replace(PRESETS["llama2-7b"], num_layers=33)
    report = check(config(tmp_path), found, None)
    assert report.source == found
    assert report.warnings == ["source.shape: num_layers differ from nowhere/llama2-7b, whose config.json counts"]


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("run.phases=[]", "run.phases: the list is empty"),
        ("run.phases=[pretrain,prune]", "run.phases: pretrain, prune are not in order"),
        ("run.phases=[prune,prune]", "run.phases: prune, prune are not in order"),
        ("data.folder=null", "data.folder: missing"),
        ("source.shape.preset=llama2-7c", "source.shape.preset: no shape is called 'llama2-7c'"),
        ("target.preset=null", "target: missing"),
        ("target.hidden_size=8192", "target.hidden_size: 8192 is more than"),
        ("target.hidden_size=2559", "target.hidden_size: 2559 is not divisible"),
        ("parallel.world_size=5", "parallel.world_size: 5 ranks are not divisible"),
        ("prune.batch.global_batch=33", "prune.batch.global_batch: 33 is not divisible by micro_batch 1 x 2"),
        ("pretrain.batch.micro_batch=3", "pretrain.batch.global_batch: 256 is not divisible by micro_batch 3 x 2"),
        ("prune.optimizer.warmup_steps=3200", "prune.optimizer.warmup_steps: 3200 leaves nothing"),
        (
            "prune.optimizer={schedule: wsd, warmup_steps: 200, decay_steps: 3100}",
            "prune.optimizer.decay_steps: 3100 and a warm-up of 200 are more than 3200",
        ),
        ("prune.sparsity_warmup_steps=3200", "prune.sparsity_warmup_steps: 3200 of 3200"),
        ("prune.granularities=[hidden,intermediate]", "prune.granularities: group is missing"),
        ("mixture.initial_weights={}", "mixture.initial_weights: no domain"),
        ("mixture.initial_weights={a: -1,b: 2}", "mixture.initial_weights: a: a weight that follows"),
        ("mixture={rule: static, initial_weights: {a: 0}}", "mixture.initial_weights: they sum to 0"),
        ("mixture={rule: static, initial_weights: {a: -1}}", "mixture.initial_weights: a: weights are not negative"),
        ("mixture.references=list", "mixture.reference_losses: missing"),
        ("mixture={references: list, reference_losses: {a: -1}}", "mixture.reference_losses: a: a cross entropy"),
        (
            "mixture={references: list, reference_losses: {a: 1}, initial_weights: {b: 1}}",
            "mixture.reference_losses: a, b: not in both",
        ),
        ("mixture.references=scaling_law", "mixture.scaling_law: missing"),
        ("mixture={floor: 0.6, cap: 0.5}", "mixture.floor: 0.6 is above"),
        ("mixture={floor: 0.6, initial_weights: {a: 1, b: 1}}", "mixture.floor: 0.6 x 2 domains is above 1"),
        ("mixture={cap: 0.4, initial_weights: {a: 1, b: 1}}", "mixture.cap: 0.4 x 2 domains is below 1"),
    ],
)
def test_each_rule(tmp_path: Path, override: str, expected: str) -> None:
    found = problems(tmp_path, override)
    assert [message for message in found if message.startswith(expected)], found
    assert len(found) == 1, found


def test_references_of_the_source_need_its_weights(tmp_path: Path) -> None:
    (message,) = problems(tmp_path, "source.folder=null")
    assert message.startswith("mixture.references: `source` evaluates the source model")
    assert check(config(tmp_path, "source.folder=null", "mixture.rule=static"), None, None).problems == []


def test_a_source_is_needed(tmp_path: Path) -> None:
    (message,) = problems(tmp_path, "source={folder: null, shape: {preset: null}}", "mixture.rule=static")
    assert message.startswith("source: neither folder nor shape")


def test_interleaved_pipelines_need_whole_rounds_of_micro_batches(tmp_path: Path) -> None:
    layout = "parallel={tensor: 1, pipeline: 4, virtual_pipeline: 2, world_size: 4}"
    (message,) = problems(tmp_path, layout, "prune.batch.global_batch=30")
    assert "makes 30 micro-batches" in message
    assert "use 28 or 32" in message
    assert check(config(tmp_path, layout), None, None).problems == []


def test_launched_ranks_and_planned_ranks(tmp_path: Path) -> None:
    (message,) = problems(tmp_path, world=8)
    assert message.startswith("parallel.world_size: 4, but 8 ranks were launched")


def test_all_problems_at_once(tmp_path: Path) -> None:
    found = problems(tmp_path, "run.phases=[pretrain,prune]", "prune.batch.global_batch=33", "target.hidden_size=2559")
    assert len(found) == 3


def test_dataset_against_the_config(tmp_path: Path) -> None:
    dataset(tmp_path / "data", cc=10**12, book=100)
    found = problems(tmp_path, "mixture.initial_weights={cc: 1, bok: 1}", "source.shape.vocab_size=31999")
    assert any("made with a tokenizer of 32000 tokens, and the model has 31999" in message for message in found)
    assert any("names bok, not in the dataset and lacks book" in message for message in found)
    assert any("domain book has 100 training tokens, less than one sample" in message for message in found)
    assert len(found) == 3


def test_warnings_of_many_epochs_and_short_held_out_data(tmp_path: Path) -> None:
    tokens = (3200 * 32 + 48000 * 256) * 128
    dataset(tmp_path / "data", cc=tokens, book=tokens // 10)
    overrides = ("mixture.initial_weights={cc: 1, book: 1}", "prune.batch.eval_sequences=65")
    warnings = check(config(tmp_path, *overrides), None, None).warnings
    assert "domain book would be read 5.0 times" in warnings[0]
    assert warnings[1] == "data: domain cc has 64 held-out sequences, eval_sequences asks for 65"
    assert len(warnings) == 3


def test_damaged_dataset_manifest_is_a_problem(tmp_path: Path) -> None:
    folder = dataset(tmp_path / "data")
    good: dict[str, Any] = json.loads((folder / "manifest.json").read_text())
    for broken in ({}, {**good, "domains": 3}, {**good, "tokenizer": {}}, {**good, "domains": {"a": {"train": {}}}}):
        (folder / "manifest.json").write_text(json.dumps(broken))
        with pytest.raises(DataError):
            read_dataset(folder)
        assert "manifest.json" in problems(tmp_path)[0]


def test_from_scratch_takes_the_vocabulary_of_the_dataset(tmp_path: Path) -> None:
    dataset(tmp_path / "data")
    text = """
run: {phases: [pretrain]}
source: {shape: {hidden_size: 64, num_layers: 2, num_heads: 4, intermediate_size: 128}}
data: {folder: DATA, sequence_length: 128}
mixture: {rule: static}
parallel: {world_size: 1}
"""
    report = check(config(tmp_path, text=text), None, None)
    assert report.source is not None
    assert report.source.vocab_size == 32000
    assert report.memory.keys() == {"pretrain"}
    assert report.target is None


def test_defaults_alone_name_what_is_missing() -> None:
    found = examine(Config(), None, None).problems
    assert {message.split(":")[0] for message in found} == {"data.folder", "source", "target", "mixture.references"}


def test_words_of_granularities_are_those_of_the_masks() -> None:
    assert keys.leaf_keys()["prune", "granularities"].choices == GRANULARITIES


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("rule: schedule", "mixture.schedule: missing"),
        ("rule: schedule, schedule: {a: [1, 2], b: [1]}", "the same number of weights"),
        ("rule: schedule, schedule: {a: [1, -2], b: [1, 1]}", "a: weights are not negative"),
        ("rule: schedule, schedule: {a: [1, 0], b: [1, 0]}", "the weights at point 2 sum to 0"),
        ("rule: static, schedule: {a: [1], b: [1]}", "used by `rule: schedule` alone"),
    ],
)
def test_schedules_that_cannot_be(tmp_path: Path, given: str, words: str) -> None:
    (message,) = problems(tmp_path, f"mixture={{{given}}}")
    assert words in message


def test_a_schedule_needs_no_references(tmp_path: Path) -> None:
    chosen = "mixture={rule: schedule, schedule: {a: [1, 2], b: [1, 0]}}"
    assert check(config(tmp_path, chosen, "source.folder=null"), None, None).problems == []


def test_evaluations_that_take_much_of_the_time(tmp_path: Path) -> None:
    """Seven domains at the published interval and batch: the default of 32 sequences each is under 5 %."""
    names = ["cc", "github", "book", "stack", "wiki", "arxiv", "c4"]
    dataset(tmp_path / "data", **dict.fromkeys(names, 10**10))
    share = evaluation_share(BatchConfig(), 128, Dataset(dict.fromkeys(names, Domain(10**10, 10**6)), 32000))
    assert share == pytest.approx(7 * 32 / 3 / (7 * 32 / 3 + 1600)) and share < 0.05
    assert not any("held-out evaluation" in line for line in check(config(tmp_path), None, None).warnings)
    found = check(config(tmp_path, "prune.batch.eval_interval=2"), None, None).warnings
    assert any(line.startswith("prune.batch: held-out evaluation would take about 54%") for line in found), found


def test_a_limit_of_repeating_where_nothing_repeats(tmp_path: Path) -> None:
    (message,) = problems(tmp_path, "data.repeat_limit=2", "data.exhausted=stop")
    assert "data.repeat_limit: 2, but data.exhausted is stop" in message


@pytest.mark.parametrize("phase", ["prune", "pretrain"])
def test_a_run_from_scratch_has_no_teacher(tmp_path: Path, phase: str) -> None:
    scratch = GOOD.replace(", folder: nowhere/llama2-7b", "")
    found = problems(tmp_path, f"{phase}.distillation.weight=0.5", "mixture.references=list", text=scratch)
    words = f"{phase}.distillation.weight: 0.5, but a run from scratch has no source"
    assert any(line.startswith(words) for line in found)
    check(config(tmp_path, f"{phase}.distillation.weight=0.5"), None, None)


def test_a_teacher_is_counted(tmp_path: Path) -> None:
    """Its memory, and its forward FLOPs beside those of the phase."""
    untaught = config(tmp_path, "prune.distillation.weight=0")
    plain = check(untaught, None, 4)
    taught_config = config(tmp_path, "prune.distillation.weight=0.5", "pretrain.distillation.weight=0.25")
    taught = check(taught_config, None, 4)
    for phase in ("prune", "pretrain"):
        (without,), (with_it,) = plain.memory[phase], taught.memory[phase]
        assert without.teacher == 0 and with_it.total == without.total + with_it.teacher
        assert with_it.teacher > 2 * PRESETS["llama2-7b"].parameters() // 2, "bf16, over two ranks"
    text = render(taught_config, taught)
    lines = [line.split() for line in text[text.index("Teachers") :].splitlines()[3:5]]
    assert [(line[0], line[1], line[2], line[-1]) for line in lines] == [
        ("prune", "0.5", "1", "33%"),
        ("pretrain", "0.25", "1", "84%"),  # (6.738 - 0.131) / (2.702 - 0.082) / 3: parameters but the embedding
    ]
    assert "Teachers" not in render(untaught, plain)


def test_a_model_that_would_teach_itself_is_said(tmp_path):
    weight = "pretrain.distillation.weight=0.5"
    for until, consequence in (("end", "holds it there"), ("student_better", "it changes next to nothing")):
        keys = [weight, "run.phases=[pretrain]", "target=null", f"pretrain.distillation.stop_when={until}"]
        said = examine(config(tmp_path, *keys), None, None).warnings
        assert [text for text in said if "the very model that training starts from" in text and consequence in text]
    assert not [text for text in examine(config(tmp_path, weight), None, None).warnings if "very model" in text]


def test_disk_space_counts_model_folders(tmp_path):
    """LLaMA2-7B to 2.7B, at the cut: rotated and masked source, two moments of each model, and the pruned one; in one
    shot rotated and fitted source, and the pruned model.
    """
    one_shot = ["prune.method=one_shot"]
    cases = ([], 8, 8), (["prune.basis=source"], 6, 8), (one_shot, 4, 4), ([*one_shot, "prune.refit=0"], 2, 4)
    for overrides, source, target in cases:
        chosen = config(tmp_path, *overrides)
        found = examine(chosen, None, None)
        size = (source * found.source.parameters() + target * found.target.parameters()) / 2**30
        assert re.search(rf"^models +{size:.1f}$", render(chosen, found), re.MULTILINE), overrides


def calibration_lines(folder: Path, *overrides: str) -> list[list[str]]:
    """The table of calibration, its cells; nothing where there is none."""
    chosen = config(folder, "data.sequence_length=4096", "prune.batch.global_batch=32", *overrides)
    text = render(chosen, examine(chosen, None, None))
    if "Calibration before pruning" not in text:
        return []
    part = text[text.index("Calibration") :].split("\n\n")[0]
    return [re.split(r" {2,}", line) for line in part.splitlines()[2:]]


def test_calibration_is_counted(tmp_path):
    """LLaMA2-7B to 2.7B: 16 batches for the basis (a forward pass) and Fisher scores (half a backward as well); the fit
    keeps both models' bf16 streams of its batches in the hosts' memory, on each of two tensor-parallel ranks.
    """
    passes = 16 * 32 * 4096 * PRESETS["llama2-7b"].flops_per_token(4096) / 3
    learned = calibration_lines(tmp_path, "pretrain.batch.steps=3200", "pretrain.batch.global_batch=32")
    assert learned[:2] == [["tokens", "2.10 M"], ["FLOPs", f"{3 * passes:.2e}"]]
    shares = 3200 * 32 * PRESETS["llama2-7b"].flops_per_token(4096)
    shares += 3200 * 32 * PRESETS["sheared-2.7b"].flops_per_token(4096)
    assert learned[2:] == [["as a share of the training's", f"{3 * passes / 4096 / shares:.1%}"]]
    fitted = calibration_lines(tmp_path, "prune.method=one_shot")
    assert fitted[-1] == ["host memory, over tensor- and data-parallel ranks", "52.00 GiB"]
    assert float(fitted[1][1]) > 4.5 * passes
    assert float(calibration_lines(tmp_path, "prune.method=one_shot", "run.phases=[prune]")[1][1]) > 4.5 * passes
    assert calibration_lines(tmp_path, "prune.preset=paper", "prune.basis=source") == []
    assert calibration_lines(tmp_path, "run.phases=[pretrain]", "target=null") == []
