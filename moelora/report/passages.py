"""Domains of text: read from files, cut into passages, laid out in batches."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from moelora.errors import ReportError
from moelora.report.results import DomainSummary

SUFFIXES = (".txt", ".jsonl", ".json")
#: Characters of a plain text file that are taken as one text: files may be larger than memory.
BLOCK = 16_384
#: A .json file has to be read as a whole.
LARGEST_JSON = 256 * 2**20


@dataclass(frozen=True)
class Passage:
    """A piece of text that the model reads at once.

    Attributes:
        domain: position of its domain.
        index: its number within the domain.
        ids: its tokens.
    """

    domain: int
    index: int
    ids: tuple[int, ...]


def read_domains(
    sources: Sequence[str], *, fields: Sequence[str] = ("text",)
) -> tuple[dict[str, Iterator[str]], dict[str, str]]:
    """Name the domains of files and folders; their texts are read only when they are iterated.

    Args:
        sources: ``name=path`` or ``path``. A file is one domain, named like it without ``name=``. A
            folder without ``name=`` holds one domain per file, and with it one domain of all files.
        fields: of a record in ``.jsonl`` or ``.json`` files; several are joined by line breaks.

    Returns:
        The texts and the source of each domain, by its name.

    Raises:
        ReportError: if a path does not exist, is of no known kind, a folder holds no such file, or
            two domains have one name. Iterating raises it for what cannot be read.
    """
    files: dict[str, list[Path]] = {}
    for source in sources:
        with _readable(Path(source)):
            named = list(_named_files(source))
        for name, paths in named:
            if not all(_is_unicode(text) for text in (name, *(path.name for path in paths))):
                raise ReportError(f"{source!r}: the name of a domain or file is not UTF-8.")
            if name in files:
                raise ReportError(f"Two domains are named {name!r}: name them, --data NAME=PATH.")
            files[name] = paths
    if not files:
        raise ReportError("--data names no domain.")
    texts = {name: _texts(paths, fields) for name, paths in files.items()}
    return texts, {name: ", ".join(path.name for path in paths) for name, paths in files.items()}


def _named_files(source: str) -> Iterator[tuple[str, list[Path]]]:
    name, equals, rest = source.partition("=")
    path = Path(source)
    # a path may hold an equals sign itself
    if equals and not path.exists():
        if not name.strip() or not rest:
            raise ReportError(f"--data must be NAME=PATH or PATH, got {source!r}.")
        path = Path(rest)
    else:
        name = ""
    if path.is_dir():
        inside = sorted(p for p in path.iterdir() if p.is_file() and p.suffix in SUFFIXES)
        if not inside:
            raise ReportError(f"Folder {path} holds no file of {', '.join(SUFFIXES)}.")
        if name:
            yield name, inside
        else:
            yield from ((each.stem, [each]) for each in inside)
        return
    if not path.is_file():
        raise ReportError(f"{path} does not exist.")
    if path.suffix not in SUFFIXES:
        raise ReportError(f"{path} must be a file of {', '.join(SUFFIXES)}, or a folder of such.")
    yield name or path.stem, [path]


def _texts(paths: Sequence[Path], fields: Sequence[str]) -> Iterator[str]:
    for path in paths:
        with _readable(path):
            if path.suffix == ".txt":
                yield from _blocks(path)
            elif path.suffix == ".jsonl":
                yield from _lines(path, fields)
            else:
                yield from _records(path, fields)


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ReportError(f"{path} cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise ReportError(
            f"{path} is not UTF-8: byte 0x{error.object[error.start]:02x}, {error.reason}."
        ) from error


def _blocks(path: Path) -> Iterator[str]:
    """A plain text in blocks that end with a line, as far as lines are shorter than a block."""
    with path.open(encoding="utf-8-sig") as file:
        block = ""
        while piece := file.readline(BLOCK):
            if block and len(block) + len(piece) > BLOCK:
                yield block
                block = ""
            block += piece
        if block:
            yield block


def _lines(path: Path, fields: Sequence[str]) -> Iterator[str]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                record = _parsed(line.decode("utf-8-sig"), where=f"{path}:{number}")
                yield _text_of(record, fields, where=f"{path}:{number}")


def _records(path: Path, fields: Sequence[str]) -> Iterator[str]:
    if path.stat().st_size > LARGEST_JSON:
        raise ReportError(f"{path} is larger than {LARGEST_JSON >> 20} MiB: make it a .jsonl file.")
    content = _parsed(path.read_text(encoding="utf-8-sig"), where=str(path))
    records = content if isinstance(content, list) else [content]
    for number, record in enumerate(records, start=1):
        yield _text_of(record, fields, where=f"{path}, record {number}")


def _parsed(text: str, *, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        reason = error.msg if isinstance(error, json.JSONDecodeError) else "nested too deeply"
        raise ReportError(f"{where}: invalid JSON: {reason}.") from error


def _text_of(record: Any, fields: Sequence[str], *, where: str) -> str:
    if isinstance(record, str):
        return _whole(record, where)
    if not isinstance(record, dict):
        raise ReportError(f"{where}: must be an object or a text, got {type(record).__name__}.")
    missing = [field for field in fields if field not in record]
    if missing:
        raise ReportError(
            f"{where}: the field {missing[0]!r} is missing, it has {sorted(record)!r:.200}. Name "
            "the field that holds the text: --field NAME."
        )
    values = [record[field] for field in fields]
    for field, value in zip(fields, values, strict=True):
        if not isinstance(value, str):
            raise ReportError(f"{where}: {field!r} must be a text, got {type(value).__name__}.")
    return _whole("\n".join(values), where)


def _whole(text: str, where: str) -> str:
    # JSON can spell half a surrogate pair, which no tokenizer takes
    if not _is_unicode(text):
        raise ReportError(f"{where}: holds half a surrogate pair.")
    return text


def _is_unicode(text: str) -> bool:
    return not any("\ud800" <= character <= "\udfff" for character in text)


# Passages ------------------------------------------------------------------------------------


def cut_passages(
    domains: Mapping[str, Iterable[str]],
    tokenizer: Any,
    *,
    max_tokens: int,
    max_length: int,
    sources: Mapping[str, str] | None = None,
) -> tuple[list[Passage], list[DomainSummary]]:
    """Tokenise each domain until it has ``max_tokens`` and cut the texts into passages.

    Args:
        domains: texts by the name of their domain.
        tokenizer: of the model.
        max_tokens: most tokens of a domain.
        max_length: most tokens of a passage.
        sources: where each domain came from.

    Raises:
        ReportError: if there is no domain, one is a single string, holds something else than
            texts, or no token.
    """
    passages: list[Passage] = []
    summaries: list[DomainSummary] = []
    for position, (name, texts) in enumerate(domains.items()):
        if isinstance(texts, str | bytes):
            raise ReportError(f"Domain {name!r} must be a list of texts, got one string.")
        before = len(passages)
        number, left = 0, max_tokens
        complete = True
        for text in texts:
            if left == 0:
                complete = False
                break
            ids = _token_ids(text, tokenizer, name)
            complete = len(ids) <= left
            number += bool(ids)
            for start in range(0, min(len(ids), left), max_length):
                piece = tuple(ids[start : min(start + max_length, left)])
                passages.append(Passage(position, len(passages) - before, piece))
            left -= min(len(ids), left)
        if number == 0:
            raise ReportError(f"Domain {name!r} holds no text.")
        source = (sources or {}).get(name, "")
        tokens = max_tokens - left
        summaries.append(
            DomainSummary(name, source, number, len(passages) - before, tokens, complete)
        )
    if not summaries:
        raise ReportError("A report needs at least one domain of text.")
    return passages, summaries


def _token_ids(text: Any, tokenizer: Any, domain: str) -> list[int]:
    if not isinstance(text, str):
        raise ReportError(f"Domain {domain!r} must hold texts, got {type(text).__name__}.")
    # a text longer than the model is cut by us: the tokenizer need not warn
    ids: list[int] = tokenizer(text, verbose=False).input_ids if text.strip() else []
    return ids


def batches(passages: Sequence[Passage], *, batch_size: int) -> Iterator[list[Passage]]:
    """Group passages in their order, each batch of one domain.

    Args:
        passages: domain by domain.
        batch_size: most passages of a batch.
    """
    batch: list[Passage] = []
    for passage in passages:
        if batch and (len(batch) == batch_size or batch[0].domain != passage.domain):
            yield batch
            batch = []
        batch.append(passage)
    if batch:
        yield batch


def pad(
    rows: Sequence[Sequence[int]], *, pad_token_id: int
) -> tuple[Int[Tensor, "batch seq"], Int[Tensor, "batch seq"]]:
    """Return token ids padded on the right, and their attention mask.

    Args:
        rows: at least one.
        pad_token_id: what fills the ids.

    Example:
        >>> pad([[5, 6], [7]], pad_token_id=0)
        (tensor([[5, 6],
            [7, 0]]), tensor([[1, 1],
            [1, 0]]))
    """
    width = max(map(len, rows))
    ids = [[*row, *[pad_token_id] * (width - len(row))] for row in rows]
    mask = [[1] * len(row) + [0] * (width - len(row)) for row in rows]
    return torch.tensor(ids), torch.tensor(mask)
