"""Supervised fine-tuning of a mixture with TRL: completions alone, TRL logs the router loss.

    python examples/trl_sft.py --steps 20

Runs offline on a tiny model; `--model NAME --data pairs.jsonl` takes a real one. Needs
`pip install moelora trl`.
"""

import argparse

import torch
from datasets import Dataset, load_dataset
from small_model import counting, load
from trl import SFTConfig, SFTTrainer

from moelora import MoELoraConfig, MoEOptimizer, MoETrainerCallback


def main() -> None:
    """Train and save."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="a model's name or folder; a tiny one is made without")
    parser.add_argument("--data", help="JSON lines with the keys prompt and completion")
    parser.add_argument("--out", default="sft-mixture")
    parser.add_argument("--steps", type=int, default=20)
    arguments = parser.parse_args()

    base, tokenizer = load(arguments.model)
    if arguments.data is not None:
        dataset = load_dataset("json", data_files=arguments.data, split="train")
    else:
        pairs = [(counting(i, 3), counting(i + 3, 4)) for i in range(64)]
        dataset = Dataset.from_list([{"prompt": p, "completion": c} for p, c in pairs])

    trainer = SFTTrainer(
        base,
        SFTConfig(
            output_dir=arguments.out,
            max_steps=arguments.steps,
            per_device_train_batch_size=4,
            gradient_accumulation_steps=2,
            gradient_checkpointing=True,
            completion_only_loss=True,
            # TRL weighs the routers' balancing loss by this, and logs it as aux_loss
            router_aux_loss_coef=0.01,
            logging_steps=max(1, arguments.steps // 4),
            report_to="none",
            bf16=torch.cuda.is_available(),
            use_cpu=not torch.cuda.is_available(),
        ),
        train_dataset=dataset,
        processing_class=tokenizer,
        peft_config=MoELoraConfig(
            num_experts=4,
            top_k_experts=2,
            r=8,
            target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
            task_type="CAUSAL_LM",
        ),
        callbacks=[MoETrainerCallback()],
        optimizer_cls_and_kwargs=(MoEOptimizer, {"lr": 2e-3, "router_lr": 4e-3}),
    )
    trainer.train()
    trainer.save_model(arguments.out)
    print(f"saved to {arguments.out}")


if __name__ == "__main__":
    main()
