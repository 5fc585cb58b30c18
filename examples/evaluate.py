"""lm-eval judges a mixture on a task of one's own, with the plugin imported by `moelora run`.

    python examples/evaluate.py --out judged

Teaches a tiny model to count, writes a task (a YAML file and lines of JSON), and then does what

    moelora run lm_eval --model hf --model_args pretrained=BASE,peft=MIXTURE --tasks counting ...

does. Offline, less than a minute on a CPU. Needs `pip install moelora lm-eval`.
"""

import argparse
import json
from pathlib import Path

import torch
from peft import get_peft_model
from small_model import counting, load

from moelora import MoELoraConfig
from moelora.cli import main as moelora

TASK = """\
task: counting
dataset_path: json
dataset_kwargs: {data_files: {test: %s}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{prompt}}"
doc_to_choice: "{{choices}}"
doc_to_target: 0
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""


def main() -> None:
    """Train, save, write the task and let lm-eval judge."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="judged", type=Path)
    parser.add_argument("--steps", type=int, default=60)
    arguments = parser.parse_args()
    out = arguments.out.resolve()

    torch.manual_seed(0)
    base, tokenizer = load(None)
    base.save_pretrained(out / "base")
    tokenizer.save_pretrained(out / "base")
    config = MoELoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(base, config)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2)
    ids = tokenizer([counting(start, 8) for start in range(48)], return_tensors="pt")["input_ids"]
    for _ in range(arguments.steps):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(out / "mixture")

    # what follows, one word or two, and what does not
    questions = [
        {
            "prompt": counting(start, 4).strip(),
            "choices": [counting(start + 4, 1 + start % 2).strip(), counting(start, 1).strip()],
        }
        for start in range(0, 40, 4)
    ]
    (out / "data.jsonl").write_text("".join(json.dumps(each) + "\n" for each in questions))
    (out / "tasks").mkdir(exist_ok=True)
    (out / "tasks" / "counting.yaml").write_text(TASK % (out / "data.jsonl"))
    given = f"pretrained={out / 'base'},peft={out / 'mixture'},dtype=float32"
    asked = ["--model", "hf", "--model_args", given, "--tasks", "counting", "--batch_size", "4"]
    asked += ["--include_path", str(out / "tasks"), "--output_path", str(out / "results")]
    raise SystemExit(moelora(["run", "lm_eval", *asked, "--device", "cpu", "--log_samples"]))


if __name__ == "__main__":
    main()
