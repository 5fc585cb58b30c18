"""Domains from files: what is read, how it is cut, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moelora import ReportError
from moelora.report import passages
from moelora.report.passages import batches, cut_passages, pad, read_domains
from tests.models import unchecked_types
from tests.report.tiny import TOKENIZER


def texts_of(sources: list[Any], **options: Any) -> dict[str, list[str]]:
    domains, _ = read_domains([str(source) for source in sources], **options)
    return {name: list(texts) for name, texts in domains.items()}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    home = tmp_path / "data"
    home.mkdir()
    (home / "plain.txt").write_bytes("\ufefföne\ntwo\r\n".encode())
    (home / "lines.jsonl").write_text('{"text": "a", "n": 1}\n\n"b"\n{"text": "\\u2028c"}')
    (home / "list.json").write_text('[{"text": "x"}, "y"]')
    (home / "notes.md").write_text("no domain")
    (home / ".hidden").mkdir()
    return home


def test_a_folder_holds_one_domain_per_file(folder: Path) -> None:
    assert texts_of([folder]) == {
        "lines": ["a", "b", "\u2028c"],
        "list": ["x", "y"],
        "plain": ["öne\ntwo\n"],
    }


def test_a_named_folder_is_one_domain(folder: Path) -> None:
    assert texts_of([f"all={folder}"]) == {"all": ["a", "b", "\u2028c", "x", "y", "öne\ntwo\n"]}


def test_files_are_named_by_hand_or_by_themselves(folder: Path, tmp_path: Path) -> None:
    odd = tmp_path / "a=b.txt"
    odd.write_text("odd")
    found = texts_of([f"one={folder / 'list.json'}", folder / "plain.txt", odd])
    assert list(found) == ["one", "plain", "a=b"]


def test_a_single_record_is_a_text(tmp_path: Path) -> None:
    path = tmp_path / "one.json"
    path.write_text('{"text": "alone"}')
    assert texts_of([path]) == {"one": ["alone"]}


def test_several_fields_are_joined(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text('{"prompt": "p", "completion": "c"}')
    assert texts_of([path], fields=("prompt", "completion")) == {"pairs": ["p\nc"]}


def test_a_long_plain_text_comes_in_blocks_that_lose_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(passages, "BLOCK", 10)
    path = tmp_path / "long.txt"
    text = "abc\ndefgh\nij\n" + "k" * 25 + "\nlast"
    path.write_text(text)
    (blocks,) = texts_of([path]).values()
    assert "".join(blocks) == text
    assert blocks[0] == "abc\ndefgh\n"
    assert max(map(len, blocks)) <= 10


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"ab\xffcd", "a.txt is not UTF-8: byte 0xff"),
        ("a.jsonl", b'{"text": "\xff"}', "a.jsonl is not UTF-8"),
        ("a.jsonl", b'{"text": 1}', r"a.jsonl:1: 'text' must be a text, got int"),
        ("a.jsonl", b'"x"\n{"body": "b"}', r"a.jsonl:2: the field 'text' is missing.*\['body'\]"),
        ("a.jsonl", b"{", "a.jsonl:1: invalid JSON"),
        ("a.jsonl", b"[1]", "a.jsonl:1: must be an object or a text, got list"),
        ("a.jsonl", b'"\\ud800"', "a.jsonl:1: holds half a surrogate pair"),
        ("a.jsonl", b"[" * 100_000, "nested too deeply|invalid JSON"),
        ("a.json", b'["x", null]', "a.json, record 2: must be an object or a text"),
        ("a.json", b"", "a.json: invalid JSON"),
    ],
)
def test_damaged_files_are_refused_by_line(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ReportError, match=message):
        texts_of([path])


def test_a_json_file_too_large_to_read_at_once_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(passages, "LARGEST_JSON", 3)
    path = tmp_path / "a.json"
    path.write_text('["xyz"]')
    with pytest.raises(ReportError, match=r"make it a \.jsonl file"):
        texts_of([path])


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("nowhere.txt", "nowhere.txt does not exist"),
        ("name=nowhere.txt", "nowhere.txt does not exist"),
        ("=x", "--data must be NAME=PATH"),
        ("x=", "--data must be NAME=PATH"),
        ("notes.md", "must be a file of .txt, .jsonl, .json"),
        ("empty", "holds no file of .txt"),
    ],
)
def test_sources_that_are_none_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("notes.md").write_text("x")
    Path("empty").mkdir()
    with pytest.raises(ReportError, match=message):
        read_domains([source])


def test_two_domains_of_one_name_are_refused(folder: Path) -> None:
    with pytest.raises(ReportError, match="Two domains are named 'plain'"):
        read_domains([str(folder), str(folder / "plain.txt")])
    with pytest.raises(ReportError, match="names no domain"):
        read_domains([])


@given(
    st.lists(st.text("ab \n", max_size=12), min_size=1, max_size=6),
    st.integers(1, 20),
    st.integers(1, 7),
)
def test_passages_hold_the_first_tokens_in_their_order(
    texts: list[str], max_tokens: int, max_length: int
) -> None:
    ids = [i for text in texts if text.strip() for i in TOKENIZER(text).input_ids]
    options = {"max_tokens": max_tokens, "max_length": max_length}
    if not ids:
        with pytest.raises(ReportError, match="holds no text"):
            cut_passages({"a": texts}, TOKENIZER, **options)
        return
    cut, (summary,) = cut_passages({"a": texts}, TOKENIZER, **options)
    assert [i for passage in cut for i in passage.ids] == ids[:max_tokens]
    assert max(len(passage.ids) for passage in cut) <= max_length
    assert [passage.index for passage in cut] == list(range(len(cut)))
    assert (summary.tokens, summary.passages) == (min(max_tokens, len(ids)), len(cut))
    if len(ids) != max_tokens:
        assert summary.complete is (len(ids) < max_tokens)


def test_batches_hold_one_domain_and_keep_the_order() -> None:
    cut, _ = cut_passages({"a": ["ab"] * 3, "b": ["c"] * 2}, TOKENIZER, max_tokens=99, max_length=4)
    groups = list(batches(cut, batch_size=2))
    assert [[p.domain for p in group] for group in groups] == [[0, 0], [0], [1, 1]]
    assert [p for group in groups for p in group] == cut


def test_padding_is_on_the_right_and_masked() -> None:
    ids, mask = pad([(1, 2, 3), (4,)], pad_token_id=9)
    assert ids.tolist() == [[1, 2, 3], [4, 9, 9]]
    assert mask.tolist() == [[1, 1, 1], [1, 0, 0]]


@pytest.mark.parametrize(
    ("domains", "message"),
    [
        ({}, "at least one domain"),
        ({"a": "text"}, "Domain 'a' must be a list of texts, got one string"),
        ({"a": [1]}, "Domain 'a' must hold texts, got int"),
        ({"a": []}, "Domain 'a' holds no text"),
        ({"a": ["", " \n"]}, "Domain 'a' holds no text"),
    ],
)
def test_domains_that_are_none_are_refused(domains: Any, message: str) -> None:
    with unchecked_types(), pytest.raises(ReportError, match=message):
        cut_passages(domains, TOKENIZER, max_tokens=9, max_length=9)


def test_an_empty_file_is_refused_when_it_is_cut(tmp_path: Path) -> None:
    path = tmp_path / "void.txt"
    path.write_text("")
    domains, sources = read_domains([str(path)])
    assert sources == {"void": "void.txt"}
    with pytest.raises(ReportError, match="Domain 'void' holds no text"):
        cut_passages(domains, TOKENIZER, max_tokens=9, max_length=9)


def test_records_of_json_lines_may_hold_anything_else(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"text": "t", "other": {"deep": [1, None]}}))
    assert texts_of([path]) == {"a": ["t"]}


def test_names_that_are_not_utf8_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a\udcff.txt"
    try:
        path.write_text("x")
    except (OSError, UnicodeEncodeError):
        pytest.skip("this file system has no such names")
    with pytest.raises(ReportError, match="is not UTF-8"):
        read_domains([str(path)])


def test_a_folder_that_cannot_be_listed_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_self: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(passages.Path, "iterdir", fail)
    with pytest.raises(ReportError, match="cannot be read: Permission denied"):
        read_domains([str(tmp_path)])
