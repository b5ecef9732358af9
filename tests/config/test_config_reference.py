"""Reference and recipes generated from the schema."""

from pathlib import Path

from megashear.config import config_keys as keys
from megashear.config.config_reference import config_markdown, recipe_text

ROOT = Path(__file__).resolve().parents[2]


def test_committed_reference_matches_schema() -> None:
    assert (ROOT / "docs/config.md").read_text(encoding="utf-8") == config_markdown()


def test_reference_lists_every_key() -> None:
    page = config_markdown()
    for key in keys.leaf_keys().values():
        assert f"| `{key.path[-1]}` |" in page
        assert key.help in page


def test_every_key_has_a_meaning() -> None:
    for key in keys.leaf_keys().values():
        assert len(key.help) >= 8, key.name
        assert not key.help.endswith("."), key.name
        if key.choices and key.default is not None:
            assert set(key.default if isinstance(key.default, list) else [key.default]) <= set(key.choices)


def test_recipe_keeps_comment_values_and_interpolations() -> None:
    text = recipe_text("# What it is.\nrun: {seed: 7}\nexport:\n  folder: ${run.folder}/hf\n")
    assert text.startswith("# What it is.\n\nrun:\n  # folder of the run")
    assert "\n  seed: 7\n" in text
    assert "\n  folder: ${run.folder}/hf\n" in text
    assert recipe_text(text) == text
