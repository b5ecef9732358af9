import json
from pathlib import Path

import pytest

from megashear.errors import DataError
from megashear.preprocess.domains import DomainRule, NoDomain, parse_domain_map, shard_domain

SHARD = Path("/data/books/gutenberg_00012.jsonl.zst")
RED = {"text": "x", "meta": {"redpajama_set_name": "RedPajamaGithub"}}


def test_redpajamas_two_forms_of_meta():
    assert DomainRule().of(RED, SHARD) == "RedPajamaGithub"
    assert DomainRule().of({**RED, "meta": json.dumps(RED["meta"])}, SHARD) == "RedPajamaGithub"


@pytest.mark.parametrize("meta", [None, {}, "no json", "[1]", 7, [1], {"redpajama_set_name": None}])
def test_lines_without_the_key_take_the_shards_name(meta):
    assert DomainRule().of({"text": "x", "meta": meta}, SHARD) == "gutenberg"
    assert DomainRule().of({"text": "x"}, SHARD) == "gutenberg"


@pytest.mark.parametrize(
    "name, domain",
    [("cc_00000.jsonl", "cc"), ("a_b_7.jsonl.gz", "a_b"), ("sample1.jsonl", "books"), ("_00001.jsonl", "books")],
)
def test_the_shards_name_or_its_folders(name, domain):
    assert shard_domain(Path("/data/books") / name) == domain


def test_a_name_for_all_and_another_key():
    assert DomainRule(fixed="all").of(RED, SHARD) == "all"
    assert DomainRule(key="source").of({"source": "wiki"}, SHARD) == "wiki"


def test_patterns_rename_values_and_shards_in_order():
    rule = DomainRule(patterns=parse_domain_map(["code=RedPajamaGit*", "code=sample_github*", "rest=*"]))
    assert rule.of(RED, SHARD) == "code"
    assert rule.of({}, Path("x/sample_github2.jsonl")) == "code"
    assert rule.of({}, SHARD) == "rest"


def test_a_map_in_a_file(tmp_path):
    path = tmp_path / "map.json"
    path.write_text('{"code": ["RedPajamaGithub", "TheStack*"], "web": "C4"}')
    assert parse_domain_map([str(path), "x=y"]) == (
        ("code", "RedPajamaGithub"),
        ("code", "TheStack*"),
        ("web", "C4"),
        ("x", "y"),
    )


@pytest.mark.parametrize("content", ["[1]", '{"a": 1}', '{"a": [1]}', "{", "7"])
def test_maps_that_are_none(tmp_path, content):
    (tmp_path / "map.json").write_text(content)
    with pytest.raises(DataError, match="--domain-map"):
        parse_domain_map([str(tmp_path / "map.json")])
    with pytest.raises(DataError, match="--domain-map"):
        parse_domain_map(["../x=C4"])


@pytest.mark.parametrize("name", ["../../etc", "a/b", "", "\0", ".x", 7, ["a"], {"a": 1}])
def test_names_that_cannot_be_files(name):
    with pytest.raises(NoDomain):
        DomainRule().of({"meta": {"redpajama_set_name": name}}, SHARD)
