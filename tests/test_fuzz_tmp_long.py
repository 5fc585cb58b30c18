"""Any bytes and any JSON: loading succeeds with equal logits, or fails with a clear error.

Never another type of error, never a changed model, never code that runs.
"""

from __future__ import annotations

import io
import json
import pickle
import shutil
import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from moelora import MoELoraConfig, MoELoraError, Router
from tests.lm import assert_same_snapshot, mixture, snapshot, tiny_llama, token_ids, two_loras
from tests.tolerances import assert_equal

CONFIG, ADAPTER, ROUTER = "adapter_config.json", "adapter_model.safetensors", "router.safetensors"
#: The fields that MoELoraConfig adds to LoraConfig.
OWN_FIELDS = sorted(
    {f.name for f in fields(MoELoraConfig)}
    - {f.name for base in MoELoraConfig.__mro__[1:2] for f in fields(base)}
)
FUZZ = settings(
    max_examples=1200,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def attempt(
    base: nn.Module,
    folder: Path,
    refused: tuple[type[Exception], ...] = (MoELoraError,),
    **names: str,
) -> tuple[Any, str]:
    """The loaded model and no message, or None and the message of a refusal."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return PeftModel.from_pretrained(base, folder, **names).eval(), ""
        except refused as error:
            return None, repr(error)


class Saved:
    """A saved mixture, a base it is loaded into again and again, and what both give."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.scratch = folder / "saved", folder / "scratch"
        model = mixture(router_type="learned_with_maturity").eval()
        model.save_pretrained(self.folder)
        self.logits = model(token_ids()).logits
        self.router = (self.folder / ROUTER).read_bytes()
        self.config = json.loads((self.folder / CONFIG).read_text())
        # frozen from the start, as PEFT leaves the base of an adapter that was unloaded
        self.base = tiny_llama().eval().requires_grad_(False)
        self.before = snapshot(self.base)
        self.base_logits = self.base(token_ids()).logits

    @contextmanager
    def copied(self) -> Iterator[Path]:
        """A copy of the folder to damage."""
        shutil.rmtree(self.scratch, ignore_errors=True)
        shutil.copytree(self.folder, self.scratch)
        yield self.scratch
        shutil.rmtree(self.scratch)

    def assert_equal_or_refused(self, folder: Path, *names: str) -> None:
        """Load ``folder``: equal logits, or a refusal whose message has one of ``names``."""
        loaded, message = attempt(self.base, folder)
        if loaded is None:
            assert any(name in message for name in names), message
        else:
            assert_equal(loaded(token_ids()).logits, self.logits)
            loaded.unload()
        assert_same_snapshot(snapshot(self.base), self.before)
        assert_equal(self.base(token_ids()).logits, self.base_logits)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """One mixture for all examples."""
    return Saved(tmp_path_factory.mktemp("fuzz"))


# Bytes of the router file ----------------------------------------------------------------------


@st.composite
def mutations(draw: st.DrawFn) -> list[tuple[str, float, bytes]]:
    """A few edits of bytes: what, where (as a share of the length), and with which bytes."""
    kinds = st.sampled_from(["replace", "insert", "delete", "truncate", "repeat"])
    edit = st.tuples(kinds, st.floats(0, 1), st.binary(min_size=1, max_size=8))
    return draw(st.lists(edit, min_size=1, max_size=4))


def mutated(content: bytes, edits: list[tuple[str, float, bytes]]) -> bytes:
    for kind, share, new in edits:
        at = int(share * len(content))
        if kind == "truncate":
            content = content[:at]
        elif kind == "insert":
            content = content[:at] + new + content[at:]
        elif kind == "delete":
            content = content[:at] + content[at + len(new) :]
        elif kind == "repeat":
            content = content[:at] + content[: len(content) - at]
        else:
            content = content[:at] + new + content[at + len(new) :]
    return content


@FUZZ
@given(edits=mutations())
def test_a_mutated_router_file_loads_equal_or_is_refused(edits: Any, saved: Saved) -> None:
    with saved.copied() as folder:
        (folder / ROUTER).write_bytes(mutated(saved.router, edits))
        saved.assert_equal_or_refused(folder, ROUTER)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=5,
)
_ENTRY = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "F64", "I64", "BOOL", "BF16", "X"]),
        "shape": st.lists(st.integers(-1, 2**40), max_size=3),
        "data_offsets": st.lists(st.integers(-1, 2**40), min_size=2, max_size=2),
    }
)


@FUZZ
@given(
    header=st.dictionaries(
        st.sampled_from(["a", "b.lora_router.c", "__metadata__"]), JSON | _ENTRY
    ),
    length=st.none() | st.integers(0, 2**64 - 1),
    data=st.binary(max_size=64),
)
def test_a_random_safetensors_header_is_refused(
    header: dict[str, Any], length: int | None, data: bytes, saved: Saved
) -> None:
    text = json.dumps(header).encode()
    with saved.copied() as folder:
        prefix = struct.pack("<Q", len(text) if length is None else length)
        (folder / ROUTER).write_bytes(prefix + text + data)
        saved.assert_equal_or_refused(folder, ROUTER)


# Metadata of the router file -------------------------------------------------------------------

_TEXT = st.text(max_size=12) | JSON.map(json.dumps) | st.sampled_from(["1", "mixture", "attached"])


@FUZZ
@given(
    changes=st.dictionaries(
        st.sampled_from(["moelora_format", "kind", "experts", "sha256", "router_config", "other"]),
        st.none() | _TEXT,
        min_size=1,
    )
)
def test_any_header_metadata_loads_equal_or_is_refused(
    changes: dict[str, str | None], saved: Saved
) -> None:
    with saved.copied() as folder:
        rewrite_header(folder / ROUTER, changes)
        saved.assert_equal_or_refused(folder, ROUTER)


def rewrite_header(path: Path, changes: dict[str, str | None]) -> None:
    """Change or remove entries of a safetensors file's metadata."""
    with safe_open(path, framework="pt") as file:
        metadata = {**file.metadata(), **changes}
    kept = {key: value for key, value in metadata.items() if value is not None}
    save_file(load_file(path), path, metadata=kept)


# The file of an attached router ----------------------------------------------------------------


class SavedAttached:
    """Two plain adapters with a router over them, saved."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.scratch = folder / "saved", folder / "scratch"
        model = two_loras().eval()
        model.base_model.set_adapter("first")
        model.attach_router(Router(16, 2, hidden_size=3))
        model.save_pretrained(self.folder)
        self.hidden = torch.randn(1, 3, 16, generator=torch.Generator().manual_seed(0))
        self.answer: Tensor = model.get_routing_weights(self.hidden)
        self.router = (self.folder / ROUTER).read_bytes()


@pytest.fixture(scope="module")
def attached(tmp_path_factory: pytest.TempPathFactory) -> SavedAttached:
    """One attached router for all examples."""
    return SavedAttached(tmp_path_factory.mktemp("attached"))


def load_attached(saved: SavedAttached) -> Any:
    """A model with the router of ``saved.scratch``; None if the file is refused by its name."""
    base = tiny_llama().eval()
    before = snapshot(base)
    loaded, message = attempt(base, saved.scratch / "first", adapter_name="first")
    if loaded is None:
        assert ROUTER in message, message
        assert_same_snapshot(snapshot(base), before)
    return loaded


@FUZZ
@given(edits=mutations())
def test_a_mutated_attached_router_answers_equal_or_is_refused(
    edits: Any, attached: SavedAttached
) -> None:
    shutil.rmtree(attached.scratch, ignore_errors=True)
    shutil.copytree(attached.folder, attached.scratch)
    (attached.scratch / ROUTER).write_bytes(mutated(attached.router, edits))
    loaded = load_attached(attached)
    if loaded is not None and loaded.router is not None:
        assert_equal(loaded.get_routing_weights(attached.hidden), attached.answer)


_ROUTER_CONFIG = st.fixed_dictionaries(
    {},
    optional={
        "input_size": JSON | st.integers(1, 2**62),
        "num_experts": JSON | st.integers(1, 2**62),
        "top_k": JSON,
        "temperature": JSON,
        "hidden_size": JSON | st.integers(1, 2**62),
        "track_maturity": JSON,
        "import": JSON,
    },
)


@FUZZ
@given(
    changes=st.fixed_dictionaries(
        {},
        optional={
            "router_config": st.none() | JSON.map(json.dumps) | _ROUTER_CONFIG.map(json.dumps),
            "router_class": st.none() | _TEXT | st.just("os.system"),
            "moe_config": st.none()
            | _TEXT
            | st.dictionaries(st.sampled_from([*OWN_FIELDS, "peft_type", "r"]), JSON).map(
                json.dumps
            )
            | st.dictionaries(st.sampled_from(OWN_FIELDS), JSON).map(
                lambda d: json.dumps({"peft_type": "MOELORA", **d})
            ),
            "kind": st.none() | _TEXT,
        },
    )
)
def test_any_description_of_an_attached_router_answers_equal_or_is_refused(
    changes: dict[str, str | None], attached: SavedAttached
) -> None:
    shutil.rmtree(attached.scratch, ignore_errors=True)
    shutil.copytree(attached.folder, attached.scratch)
    rewrite_header(attached.scratch / ROUTER, changes)
    loaded = load_attached(attached)
    if loaded is not None and loaded.router is not None:
        # another top_k or temperature, well described, is another router
        assert bool(loaded.get_routing_weights(attached.hidden).isfinite().all())


# The config ------------------------------------------------------------------------------------

# fields whose other values change nothing of a model in evaluation
_SILENT = frozenset(
    {"router_aux_loss_coef", "expert_capacity_factor", "expert_dropout", "load_balance_loss_type"}
)


@FUZZ
@given(field=st.sampled_from(OWN_FIELDS), value=JSON)
def test_any_value_of_our_fields_loads_as_it_says_or_is_refused(
    field: str, value: Any, saved: Saved
) -> None:
    with saved.copied() as folder:
        content = {**saved.config, field: value}
        (folder / CONFIG).write_text(json.dumps(content))
        valid = _is_valid(content)
        if valid and field not in _SILENT and value != saved.config[field]:
            # another temperature or top_k, say: a mixture of its own, which must only load or not
            _loads_or_is_refused(saved, folder)
            return
        saved.assert_equal_or_refused(folder, CONFIG, "num_experts", "tensors", "Tensor")


def _is_valid(content: dict[str, Any]) -> bool:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            MoELoraConfig.from_peft_type(**content)
        except (TypeError, ValueError):
            return False
    return True


def _loads_or_is_refused(saved: Saved, folder: Path) -> None:
    loaded, message = attempt(saved.base, folder)
    if loaded is None:
        assert any(name in message for name in (CONFIG, ADAPTER, ROUTER, "Tensor", "tensor"))
    else:
        assert loaded(token_ids()).logits.isfinite().all()
        loaded.unload()
    assert_same_snapshot(snapshot(saved.base), saved.before)


@FUZZ
@given(changes=st.dictionaries(st.sampled_from([*OWN_FIELDS, "r", "lora_alpha"]), JSON, min_size=2))
def test_several_random_fields_at_once_load_or_are_refused(
    changes: dict[str, Any], saved: Saved
) -> None:
    with saved.copied() as folder:
        (folder / CONFIG).write_text(json.dumps({**saved.config, **changes}))
        _loads_or_is_refused(saved, folder)


@FUZZ
@given(content=JSON.map(json.dumps).map(str.encode) | st.binary(max_size=64))
def test_a_config_of_any_content_is_refused(content: bytes, saved: Saved) -> None:
    with saved.copied() as folder:
        (folder / CONFIG).write_bytes(content)
        # without our type it is PEFT that reads it, in its own words
        with pytest.raises((ValueError, KeyError, TypeError, AttributeError)):
            PeftModel.from_pretrained(saved.base, folder)
        assert_same_snapshot(snapshot(saved.base), saved.before)


@FUZZ
@given(edits=mutations())
def test_mutated_bytes_of_the_config_load_or_are_refused(edits: Any, saved: Saved) -> None:
    with saved.copied() as folder:
        content = mutated((saved.folder / CONFIG).read_bytes(), edits)
        (folder / CONFIG).write_bytes(content)
        # a type or field that is no longer ours is PEFT's to refuse
        loaded, _ = attempt(saved.base, folder, (ValueError, KeyError, TypeError))
        if loaded is not None:
            assert loaded(token_ids()).logits.isfinite().all()
            loaded.unload()
        assert_same_snapshot(snapshot(saved.base), saved.before)


# Nothing is executed ---------------------------------------------------------------------------


class _Payload:
    """Unpickling this makes a file."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.trace,)


def _payloads(trace: Path) -> dict[str, bytes]:
    archive = io.BytesIO()
    torch.save({"weight": _Payload(trace)}, archive)
    legacy = io.BytesIO()
    torch.save({"weight": _Payload(trace)}, legacy, _use_new_zipfile_serialization=False)
    return {
        "pickle": pickle.dumps({"weight": _Payload(trace)}),
        "torch archive": archive.getvalue(),
        "old torch file": legacy.getvalue(),
    }


def test_the_payload_would_run(tmp_path: Path) -> None:
    pickle.loads(_payloads(tmp_path / "trace")["pickle"])
    assert (tmp_path / "trace").exists()


@pytest.mark.parametrize("payload", ["pickle", "torch archive", "old torch file"])
@pytest.mark.parametrize(
    "name", [ROUTER, ADAPTER, CONFIG, "adapter_model.bin", "router.bin", "router.pt"]
)
@pytest.mark.parametrize("alone", [False, True])
def test_a_pickle_under_any_name_is_never_run(
    payload: str, name: str, alone: bool, saved: Saved, tmp_path: Path
) -> None:
    trace = tmp_path / "trace"
    shutil.copytree(saved.folder, tmp_path / "folder")
    if alone:
        for weights in (ADAPTER, ROUTER):
            (tmp_path / "folder" / weights).unlink()
    (tmp_path / "folder" / name).write_bytes(_payloads(trace)[payload])
    base = tiny_llama().eval()
    before = snapshot(base)
    loaded, _ = attempt(base, tmp_path / "folder", (ValueError,))
    if loaded is not None:
        # a file that nobody asked for is not read
        assert not alone
        assert name not in (ROUTER, ADAPTER, CONFIG)
        loaded.unload()
    else:
        assert_same_snapshot(snapshot(base), before)
        with pytest.raises(ValueError, match=r"\S"):
            base.load_adapter(tmp_path / "folder")
        assert_same_snapshot(snapshot(base), before)
    assert not trace.exists()
