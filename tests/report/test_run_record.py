"""What a run began and ends with is told by what is left of it, and never guessed."""

import json
import shutil
from dataclasses import asdict
from pathlib import Path

import pytest

from helpers.synthetic_run import Page, make_run
from megashear.config.load import load_config, save_config
from megashear.config.model_shape import ModelShape
from megashear.config.presets import preset
from megashear.files.file_digests import write_manifest
from megashear.hf.hf_config import config_of_shape
from megashear.report.run_cost import costs
from megashear.report.run_record import read_run
from megashear.report.run_report import write_report

pytestmark = pytest.mark.medium  # draws many pictures

pytestmark = pytest.mark.usefixtures("small_pictures")


def write_model(folder: Path, shape: ModelShape, source: ModelShape) -> None:
    """The settings and the manifest of a model that was made from a source."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config_of_shape(shape, "float32", {})))
    write_manifest(folder, {"provenance": {"source": {"path": "gone", "shape": asdict(source)}, "phases": []}})


def test_a_source_that_is_gone_is_known_by_the_manifest_of_what_was_made_of_it(tmp_path: Path) -> None:
    """With scaled rotary frequencies, a record of its own in the shape."""
    run = make_run(tmp_path / "mine", [f"source.folder={tmp_path / 'gone'}"])
    source, target = preset("llama3.1-70b"), preset("llama3.2-1b")
    write_model(run / "pruned", target, source)
    found = read_run(run)
    assert found.source == source and found.target is not None
    assert found.target.parameters() == target.parameters()
    assert costs(found)[0].source_flops == 1e6 * source.flops_per_token(4096)
    assert any("70.6 B parameters pruned to 1.24 B" in cell for cell in Page(write_report(run)).cells)
    shutil.move(run / "pruned", run / "final")
    assert read_run(run).source == source
    (run / "config.yaml").unlink()
    assert read_run(run).source == source and str(costs(read_run(run))[0].source_flops) == "nan"


@pytest.mark.parametrize("provenance", [{}, {"source": None}, {"source": {"shape": {"hidden_size": 8, "no": 1}}}])
def test_a_sheared_model_of_an_unknown_source_was_not_trained_in_its_own_shape(
    tmp_path: Path, provenance: dict
) -> None:
    run = make_run(tmp_path / "mine", ["run.phases=[finalize,pretrain]", f"source.folder={tmp_path / 'gone'}"])
    write_model(run / "pruned", preset("sheared-1.3b"), preset("llama2-7b"))
    write_manifest(run / "pruned", {"provenance": provenance})
    cells = Page(write_report(run)).cells
    assert "A model of 1.35 B parameters, pruned from a source of unknown shape." in cells
    assert "The source's shape is not known here, so FLOPs are not counted." in cells
    assert not any("in its own shape" in cell for cell in cells)


def test_from_scratch_the_vocabulary_is_the_dataset_s(tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    counts = {"tokens": 8, "documents": 1}
    write_manifest(data, {"tokenizer": {"vocab_size": 400}, "domains": {"web": {"train": counts, "heldout": counts}}})
    sizes = {"hidden_size": 32, "num_layers": 2, "num_heads": 2, "intermediate_size": 48}
    keys = ["run.phases=[pretrain]", f"data.folder={data}", *(f"source.shape.{k}={v}" for k, v in sizes.items())]
    run = tmp_path / "mine"
    run.mkdir()
    (run / "identity.json").write_text("{}")
    save_config(load_config(None, keys), run / "config.yaml")
    found = read_run(run)
    assert found.source is not None and found.source == found.target and found.source.vocab_size == 400
    shutil.rmtree(data)
    assert read_run(run).source is None
    assert "The shape of this run's model is not known." in Page(write_report(run)).cells
