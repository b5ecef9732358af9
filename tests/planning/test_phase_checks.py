"""Keys of importance and one-shot pruning that do not go together."""

from pathlib import Path

import pytest

from megashear.config.resolve import training_phases
from megashear.planning.check import examine
from planning.test_check import config, problems

ONE_SHOT = "prune.method=one_shot"
NONE = "prune.importance.criterion=null"
PAPER = ["prune.preset=paper"]
UNTAUGHT = "prune.distillation.weight=0"
TEACHERS = {"distillation.stop_when", "distillation.chunk"}
DEAR = ["target.preset=sheared-1.3b", "prune.distillation.temperature=2"]  # an open weight is 0 there
UNTRAINED = {"optimizer.beta1", "batch.steps"}  # a joint clip is the published one
ONE_SHOT_LEAVES = {"lambda2_cap", "log_alpha_init", "importance.spread"}


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ([ONE_SHOT, NONE], "prune.importance.criterion is null"),
        (
            [ONE_SHOT, "prune.importance.criterion=fisher", "source.folder=null", "mixture.rule=static"],
            "source.folder is null",
        ),
        (
            [ONE_SHOT, "prune.importance.criterion=fisher", "prune.batch.global_batch=33"],
            "prune.batch.global_batch: 33",
        ),
        ([NONE, "prune.importance.layer_criterion=block_influence"], "prune.importance.criterion is null"),
        (["prune.importance.batches=1"], "prune.importance.batches"),
        (["prune.importance.spread=0"], "prune.importance.spread"),
        ([ONE_SHOT, "run.phases=[prune,finalize]", "data.folder=null"], "data.folder: missing"),
        (["prune.importance.criterion=block_influence"], "prune.importance.criterion"),
        (["prune.method=two_shots"], "prune.method"),
        (["prune.basis=any"], "prune.basis"),
        (["prune.freeze_steps=3200"], "prune.freeze_steps: 3200 of 3200"),
        (["prune.sparsity_warmup_steps=3000", "prune.freeze_steps=300"], "use at most 200"),
        (["prune.granularity_order=[hidden,layer,hidden]"], "prune.granularity_order: hidden more than once"),
    ],
)
def test_each_rule(tmp_path: Path, overrides: list[str], words: str) -> None:
    found = problems(tmp_path, *overrides)
    assert len(found) == 1, found
    assert words in found[0]


def test_one_shot_pruning_is_no_phase_of_training(tmp_path: Path) -> None:
    chosen = config(tmp_path, ONE_SHOT, "prune.importance.criterion=magnitude")
    assert list(training_phases(chosen)) == ["pretrain"]
    report = examine(chosen, None, None)
    assert report.problems == []
    assert all(one.gradients == one.optimizer == 0 for one in report.memory["prune"])


def test_a_criterion_of_layers_that_all_stay_is_said(tmp_path: Path) -> None:
    keys = ["prune.importance.criterion=fisher", "prune.importance.layer_criterion=angular_distance"]
    said = [text for text in examine(config(tmp_path, *keys), None, None).warnings if "layer_criterion" in text]
    assert len(said) == 1  # LLaMA2-7B to 2.7B keeps its layers
    other = examine(config(tmp_path, *keys, "target.num_layers=24"), None, None)
    assert not [text for text in other.warnings if "layer_criterion" in text]


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        ([], set()),
        ([ONE_SHOT], set()),
        ([ONE_SHOT, "prune.distillation.weight=0.5", "prune.freeze_steps=9"], {"freeze_steps"}),
        ([ONE_SHOT, "prune.distillation.weight=0.5", "pretrain.distillation.weight=1"], {"distillation.weight"}),
        ([ONE_SHOT, "prune.distillation.weight=0.5", "run.phases=[prune,finalize]"], {"distillation.weight"}),
        ([ONE_SHOT, "prune.refit=4"], set()),
        (["prune.refit=4"], {"refit"}),
        (["prune.lambda1_cap=3", "prune.lambda_learning_rate=2"], {"lambda1_cap", "lambda_learning_rate"}),
        (["prune.lambda1_cap=3", "prune.constraint=lagrangian"], set()),
        (["prune.granularities=[hidden,group,intermediate,layer]"], set()),
        (["prune.granularities=[hidden,group,layer,intermediate]"], {"granularities"}),
        ([ONE_SHOT, "prune.clip=joint", "prune.optimizer.beta1=0.8", "prune.batch.steps=7"], UNTRAINED),
        (["pretrain.moments=fresh"], set()),
        (["pretrain.moments=fresh", "prune.freeze_steps=0"], {"pretrain.moments"}),
        (["pretrain.moments=fresh", ONE_SHOT], {"pretrain.moments"}),
        (["prune.granularity_order=[layer,query,hidden]"], {"granularity_order"}),
        ([ONE_SHOT, "prune.lambda2_cap=1", "prune.log_alpha_init=1", "prune.importance.spread=7"], ONE_SHOT_LEAVES),
        (
            [ONE_SHOT, *PAPER, "prune.importance.criterion=fisher", "prune.refit=8", "prune.sharpening=2"],
            {"sharpening"},
        ),
        ([*PAPER, "prune.constraint=projected"], set()),
        (PAPER, set()),
        (["prune.log_alpha_init=1", "prune.log_alpha_limit=2"], {"log_alpha_init", "log_alpha_limit"}),
        (["prune.constraint=lagrangian", "prune.importance.spread=7"], {"importance.spread"}),
        (["prune.constraint=lagrangian", "prune.log_alpha_init=1"], {"log_alpha_init"}),
        (["prune.distillation.temperature=2"], set()),
        (["prune.distillation.temperature=2", "prune.distillation.weight=0"], {"distillation.temperature"}),
        (["prune.distillation.temperature=2", "prune.distillation.weight=1"], set()),
        (["prune.distillation.stop_when=end"], set()),
        ([UNTAUGHT, "prune.distillation.stop_when=end", "prune.distillation.chunk=9"], TEACHERS),
        ([UNTAUGHT, *PAPER, "prune.distillation.stop_when=end"], set()),
        ([UNTAUGHT, *PAPER, "prune.distillation.stop_when=student_better"], set()),
        ([ONE_SHOT, "prune.distillation.temperature=2"], {"distillation.temperature"}),
        (DEAR, {"distillation.temperature"}),
    ],
)
def test_what_changes_nothing_is_said(tmp_path: Path, overrides: list[str], named: set[str]) -> None:
    said = examine(config(tmp_path, *overrides), None, None).warnings
    keys = [text.split(":")[0].removeprefix("prune.") for text in said if "has no effect" in text]
    assert set(keys) == named


def test_too_few_steps_for_multipliers_are_said(tmp_path: Path) -> None:
    for steps, said in ((60, 1), (200, 0)):
        keys = ["prune.constraint=lagrangian", f"prune.batch.steps={steps}"]
        found = examine(config(tmp_path, *keys), None, None).warnings
        assert len([text for text in found if "multipliers need" in text]) == said


def test_one_step_keeps_nothing_by_chance(tmp_path: Path) -> None:
    keys = ["prune.batch.steps=1", "prune.batch.eval_interval=1"]
    assert examine(config(tmp_path, *keys), None, None).problems == []
    (problem,) = examine(config(tmp_path, *keys, "prune.importance.criterion=null"), None, None).problems
    assert "kept by chance" in problem
