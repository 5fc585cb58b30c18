"""Train a mixture on one or several processes; the launcher decides how.

Start it as ``accelerate launch --config_file fsdp2.yaml train.py --data lines.txt --expect FSDP``.
"""

import argparse
from pathlib import Path

from peft import get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainingArguments,
    set_seed,
)

from moelora import MoELoraConfig


def main() -> None:
    """Train, keep checkpoints on the way, and save the mixture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument("--data", required=True, type=Path, help="a text, one example a line")
    parser.add_argument("--out", default="my-mixture")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--save-steps", type=int, default=50)
    parser.add_argument("--batch-size", type=int, default=2, help="rows of each process")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
    parser.add_argument("--cpu", action="store_true", help="train on the CPU though GPUs are there")
    parser.add_argument("--backend", help="how processes talk: gloo for DeepSpeed on the CPU")
    parser.add_argument("--expect", help="stop unless this is how it is distributed: FSDP, ...")
    arguments = parser.parse_args()
    # first of all: DeepSpeed's ZeRO-3 has to know of it before the model is loaded
    training = TrainingArguments(
        arguments.out,
        max_steps=arguments.steps,
        save_steps=arguments.save_steps,
        per_device_train_batch_size=arguments.batch_size,
        learning_rate=2e-3,
        logging_steps=1,
        use_cpu=arguments.cpu,
        ddp_backend=arguments.backend,
        # experts that no token chose get zeros, so no parameter is ever left out
        ddp_find_unused_parameters=False,
    )
    # every process draws the same experts and routers
    set_seed(training.seed)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    lines = arguments.data.read_text(encoding="utf-8").splitlines()
    dataset = [tokenizer(line, truncation=True, max_length=512) for line in lines if line]
    config = MoELoraConfig(
        num_experts=8,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
        # balance over the tokens of all processes; a capacity would be counted over each one's own
        balance_over_ranks=True,
        expert_capacity_factor=None,
    )
    base = AutoModelForCausalLM.from_pretrained(arguments.model, dtype="float32")
    trainer = Trainer(
        get_peft_model(base, config),
        training,
        train_dataset=dataset,
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
    )
    kind = trainer.accelerator.distributed_type.value
    if arguments.expect not in (None, kind):
        raise SystemExit(f"Expected distributed type {arguments.expect}, but got {kind}.")
    trainer.train(resume_from_checkpoint=arguments.resume)
    trainer.save_model(arguments.out)


if __name__ == "__main__":
    main()
