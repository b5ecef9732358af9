"""Loading run files and overrides: precedence, error locations, interpolation, the paper preset."""

import math
from pathlib import Path

import pytest

from megashear.config import config_keys as keys
from megashear.config.load import load_config, save_config, to_dict
from megashear.config.presets import PAPER
from megashear.config.schema import Config
from megashear.errors import ConfigError


def write(folder: Path, text: str) -> Path:
    path = folder / "run.yaml"
    path.write_text(text)
    return path


def problems(folder: Path, text: str, overrides: list[str] | None = None) -> list[str]:
    path = write(folder, text)
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    return [line.replace(str(path), "FILE") for line in caught.value.problems]


def test_empty_file_gives_defaults(tmp_path: Path) -> None:
    assert load_config(write(tmp_path, "")) == Config()
    assert load_config(write(tmp_path, "run:\ndata:\n")) == Config()


def test_overrides_take_precedence_over_file(tmp_path: Path) -> None:
    path = write(tmp_path, "prune:\n  batch: {steps: 7, global_batch: 8}\n")
    config = load_config(path, ["prune.batch.steps=9", "mixture.initial_weights={cc: 1}", "run.folder=a=b"])
    assert (config.prune.batch.steps, config.prune.batch.global_batch, config.prune.batch.micro_batch) == (9, 8, 1)
    assert config.mixture.initial_weights == {"cc": 1.0}
    assert config.run.folder == "a=b"


def test_all_problems_are_reported_with_locations(tmp_path: Path) -> None:
    text = (
        "run:\n  sead: 3\n  phases: [prune, finalise]\n"
        "prune:\n  steps: 3\n  mask_learning_rate: fast\n"
        "data: 5\n"
        "precison: bf16\n"
    )
    found = problems(tmp_path, text, ["nonsense", "prune.batch.micro_batch=0", "parallel.sequence=1", "seed=3"])
    expected = [
        "FILE:2: unknown key run.sead; did you mean seed?",
        "FILE:5: unknown key prune.steps; did you mean prune.batch.steps?",
        "FILE:7: data is 5, expected a section of keys",
        "FILE:8: unknown key precison; did you mean precision?",
        "override 'nonsense': is not of the form key=value, for example run.seed=1",
        "override 'seed=3': unknown key seed; did you mean run.seed?",
        "FILE:3: run.phases is 'finalise', expected one of prune, finalize, pretrain, export; did you mean finalize?",
        "override 'parallel.sequence=1': parallel.sequence is 1, expected true or false",
        "override 'prune.batch.micro_batch=0': prune.batch.micro_batch is 0, expected at least 1",
        "FILE:6: prune.mask_learning_rate is 'fast', expected a finite number",
    ]
    assert sorted(found) == sorted(expected)


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("run: {seed: 1.5}", "whole number"),
        ("run: {seed: true}", "whole number"),
        ("run: {seed: -1}", "at least 0"),
        ("run: {folder: 12}", "quotes"),
        ("run: {folder: null}", "text"),
        ("run: {phases: prune}", "a list"),
        ("mixture: {initial_weights: [1]}", "a mapping"),
        ("mixture: {initial_weights: {no: 1}}", "text"),
        ("mixture: {smoothing: 1.5}", "at most 0.999"),
        ("prune: {optimizer: {learning_rate: .nan}}", "finite"),
        ("prune: {clip: jiont}", "did you mean joint?"),
        ("prune: {granularities: [heads]}", "expected one of"),
        ("run: {seed: '???'}", "set a value"),
    ],
)
def test_wrong_value_is_reported_with_expectation(tmp_path: Path, text: str, word: str) -> None:
    (message,) = problems(tmp_path, text)
    assert message.startswith("FILE:1: ")
    assert word in message


@pytest.mark.parametrize(
    "text",
    ["- 1", "3", "run: {seed: [1", "run: {seed: 1}\nrun: {seed: 2}", "a: !!python/object/apply:os.getpid []", "\t"],
    ids=["list", "number", "unclosed", "duplicate-key", "python-object", "tab"],
)
def test_invalid_files_are_refused(tmp_path: Path, text: str) -> None:
    assert problems(tmp_path, text)[0].startswith("FILE:")


def test_missing_and_binary_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(tmp_path / "none.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="UTF-8"):
        load_config(tmp_path / "binary.yaml")


def test_number_notations_are_accepted(tmp_path: Path) -> None:
    config = load_config(
        write(tmp_path, "prune: {optimizer: {learning_rate: 3e-4, clip_norm: 1}, batch: {steps: 1e3}}")
    )
    assert config.prune.optimizer.learning_rate == 3e-4
    assert config.prune.optimizer.clip_norm == 1.0
    assert config.prune.batch.steps == 1000
    assert isinstance(config.prune.batch.steps, int)


def test_interpolation_of_keys_and_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANKS", "16")
    text = "parallel: {world_size: '${oc.env:RANKS}'}\nexport: {folder: '${run.folder}/hf'}"
    config = load_config(write(tmp_path, text), ["run.folder=/data/x"])
    assert config.parallel.world_size == 16
    assert config.export.folder == "/data/x/hf"
    for bad in ("${nowhere.at.all}", "${oc.env:NOT_SET_ANYWHERE}", "${eval:1}"):
        (message,) = problems(tmp_path, f"export: {{folder: '{bad}'}}")
        assert message.startswith("FILE:1: export.folder")
    assert "${run.folder" in problems(tmp_path, "export: {folder: '${run.folder'}")[0]


def test_paper_preset_sets_unset_keys(tmp_path: Path) -> None:
    path = write(tmp_path, "prune:\n  preset: paper\n  batch: {steps: 7}\n  lambda2_cap: 3\n")
    prune = load_config(path, ["prune.optimizer.warmup_steps=null"]).prune
    assert (prune.batch.steps, prune.batch.global_batch, prune.batch.eval_interval) == (7, 32, 50)
    assert (prune.optimizer.warmup_steps, prune.sparsity_warmup_steps, prune.lambda2_cap) == (None, 640, 3.0)
    assert (prune.masking, prune.clip, prune.log_alpha_limit) == ("published", "joint", math.log(100))
    assert prune.granularities == ["hidden", "group", "intermediate", "layer"]
    assert load_config(path, ["prune.preset=null"]).prune.masking == "exact"


def test_paper_preset_covers_every_key() -> None:
    named = {("prune", a) for a in PAPER if not isinstance(PAPER[a], dict)}
    named |= {("prune", a, b) for a in PAPER if isinstance(PAPER[a], dict) for b in PAPER[a]}
    every = {at for at in keys.leaf_keys() if at[0] == "prune"}
    assert every - named == {("prune", "preset"), ("prune", "batch", "micro_batch")}
    assert named <= every


def test_saved_config_loads_unchanged(tmp_path: Path) -> None:
    text = "prune: {preset: paper}\nrun: {folder: 'yes: #1', seed: 5}\nmixture: {initial_weights: {no-1: 1}}"
    config = load_config(write(tmp_path, text))
    save_config(config, tmp_path / "saved.yaml")
    assert load_config(tmp_path / "saved.yaml") == config
    assert to_dict(config)["run"]["folder"] == "yes: #1"


def test_auto_and_null_select_the_derived_value(tmp_path: Path) -> None:
    for word in ("auto", "null"):
        config = load_config(write(tmp_path, f"prune: {{sparsity_warmup_steps: {word}}}"), [f"export.dtype={word}"])
        assert (config.prune.sparsity_warmup_steps, config.export.dtype) == (None, None)
    save_config(config, tmp_path / "saved.yaml")
    assert "sparsity_warmup_steps: auto" in (tmp_path / "saved.yaml").read_text(encoding="utf-8")
    assert "wandb_project: null" in (tmp_path / "saved.yaml").read_text(encoding="utf-8")
    assert load_config(tmp_path / "saved.yaml") == config
    assert "expected a whole number" in problems(tmp_path, "data: {repeat_limit: auto}")[0]
