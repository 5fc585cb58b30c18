"""`moelora run`: arguments and exit codes; what `transformers serve` loads through it.

lm-eval runs by it in tests/examples/test_uses.py.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from moelora.cli import main
from tests.generation.words import word_tokenizer
from tests.lm import mixture, tiny_llama
from tests.tolerances import assert_equal

ECHO = "import sys\nprint(sys.argv[1:], 'moelora' in sys.modules)\nsys.exit(7)\n"


@pytest.mark.parametrize(
    "arguments", [[], ["--help"], ["--", "x"], ["-h", "--json", "--", "--"], ["run", "--", "-m"]]
)
@pytest.mark.parametrize("before", [[], ["--"]])
def test_all_that_follows_the_module_is_handed_on(
    before: list[str],
    arguments: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "echo.py").write_text(ECHO)
    assert main(["run", *before, "echo", *arguments]) == 7
    assert capsys.readouterr().out == f"{arguments} True\n"


def test_help_before_a_module_is_the_commands_own(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["run", "--help"])
    assert end.value.code == 0
    assert "MODULE [ARGUMENT ...]" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Name the module to run"),
        (["--"], "Name the module to run"),
        (["no_such_program", "--help"], "Cannot run 'no_such_program'"),
    ],
)
def test_a_mistake_is_told_in_one_line_and_exit_code_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"moelora run: error: {message}")


def test_an_error_of_ours_in_the_program_keeps_its_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.py").write_text("import moelora; moelora.MoELoraConfig(num_experts=0)")
    assert main(["run", "broken"]) == 1
    told = capsys.readouterr().err
    assert "Traceback" in told
    assert "num_experts must be" in told


def test_an_interruption_is_the_programs_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "interrupted.py").write_text("raise KeyboardInterrupt")
    assert main(["run", "interrupted"]) == 130


# transformers serve ------------------------------------------------------------------------------


def test_the_models_of_transformers_serve_are_mixtures_where_the_files_lie_beside_the_base(
    tmp_path: Path,
) -> None:
    # all of the server but the web; it takes whole models, which may hold an adapter
    from transformers.cli.serving.model_manager import ModelManager

    tiny_llama(dtype=torch.float32).save_pretrained(tmp_path)
    word_tokenizer().save_pretrained(tmp_path)
    model = mixture(tiny_llama(dtype=torch.float32)).eval()
    model.save_pretrained(tmp_path)
    options = {"max_new_tokens": 6, "do_sample": False}
    manager = ModelManager(device="cpu", force_model=str(tmp_path))
    try:
        served, tokenizer = manager.load_model_and_processor(f"{tmp_path}@main")
        ids = tokenizer("w3 w5", return_tensors="pt")["input_ids"]
        found = served.generate(input_ids=ids, **options)
    finally:
        manager.shutdown()
    assert_equal(found, model.generate(input_ids=ids, **options))
    with model.disable_adapter():
        assert not torch.equal(found, model.generate(input_ids=ids, **options))
