import json

import pytest

from megashear.config.schema import MixtureConfig
from megashear.errors import ConfigError, DataError
from megashear.mixture.reference_losses import reference_losses

NAMES = ["web", "book"]
GOOD = {"book": 2.0, "web": 1.5}


def test_three_providers_give_the_datasets_order(tmp_path):
    path = tmp_path / "law.json"
    path.write_text(json.dumps({"parameters": 7, "references": GOOD}))
    for config, source in (
        (MixtureConfig(references="list", reference_losses=GOOD), None),
        (MixtureConfig(references="scaling_law", scaling_law=str(path)), None),
        (MixtureConfig(references="source"), GOOD),
    ):
        assert list(reference_losses(config, NAMES, source).items()) == [("web", 1.5), ("book", 2.0)]


def test_static_needs_none():
    assert reference_losses(MixtureConfig(rule="static"), NAMES) == {}


@pytest.mark.parametrize("references", ["list", "scaling_law", "source"])
def test_what_is_not_given(references):
    with pytest.raises(ConfigError, match=references):
        reference_losses(MixtureConfig(references=references), NAMES)


@pytest.mark.parametrize(
    "losses",
    [{"web": 1.0}, {**GOOD, "code": 1.0}, {**GOOD, "web": 0}, {**GOOD, "web": float("nan")}, {**GOOD, "web": "1"}],
)
def test_lists_that_do_not_fit(tmp_path, losses):
    with pytest.raises(ConfigError, match=r"mixture\.reference_losses"):
        reference_losses(MixtureConfig(references="list", reference_losses=losses), NAMES)
    with pytest.raises(DataError, match="evaluation"):
        reference_losses(MixtureConfig(references="source"), NAMES, losses)
    path = tmp_path / "law.json"
    path.write_text(json.dumps({"references": losses}))
    with pytest.raises(DataError, match=r"law\.json"):
        reference_losses(MixtureConfig(references="scaling_law", scaling_law=str(path)), NAMES)


@pytest.mark.parametrize("content", [None, "{", "[]", "{}", '{"references": 3}'])
def test_files_that_are_none(tmp_path, content):
    path = tmp_path / "law.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(DataError, match=r"law\.json"):
        reference_losses(MixtureConfig(references="scaling_law", scaling_law=str(path)), NAMES)
