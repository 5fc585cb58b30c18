"""Preference tuning of a mixture with TRL's DPO: a fresh one, or one that was trained before.

    python examples/trl_dpo.py --steps 20
    python examples/trl_dpo.py --model NAME --adapter sft-mixture --data preferences.jsonl

Runs offline on a tiny model. Needs `pip install moelora trl`.
"""

import argparse

import torch
from datasets import Dataset, load_dataset
from peft import PeftModel, get_peft_model
from small_model import counting, load
from trl import DPOConfig, DPOTrainer

from moelora import MoELoraConfig, param_groups


def main() -> None:
    """Train and save. The reference is the base, or the adapter as it was."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="a model's name or folder; a tiny one is made without")
    parser.add_argument("--adapter", help="a mixture to go on with")
    parser.add_argument("--data", help="JSON lines with the keys prompt, chosen and rejected")
    parser.add_argument("--out", default="dpo-mixture")
    parser.add_argument("--steps", type=int, default=20)
    arguments = parser.parse_args()

    base, tokenizer = load(arguments.model)
    if arguments.data is not None:
        dataset = load_dataset("json", data_files=arguments.data, split="train")
    else:
        rows = [(counting(i, 3), counting(i + 3, 4), counting(i + 30, 4)) for i in range(64)]
        dataset = Dataset.from_list(
            [dict(zip(("prompt", "chosen", "rejected"), row, strict=True)) for row in rows]
        )
    if arguments.adapter is not None:
        model = PeftModel.from_pretrained(base, arguments.adapter, is_trainable=True)
    else:
        config = MoELoraConfig(
            num_experts=4,
            top_k_experts=2,
            r=8,
            target_modules="all-linear",
            exclude_modules=["lm_head"],
        )
        model = get_peft_model(base, config)

    trainer = DPOTrainer(
        model,
        args=DPOConfig(
            output_dir=arguments.out,
            max_steps=arguments.steps,
            per_device_train_batch_size=4,
            # TRL weighs the routers' balancing loss by this, and logs it as aux_loss
            router_aux_loss_coef=0.01,
            logging_steps=max(1, arguments.steps // 4),
            logging_first_step=True,
            report_to="none",
            bf16=torch.cuda.is_available(),
            use_cpu=not torch.cuda.is_available(),
        ),
        train_dataset=dataset,
        processing_class=tokenizer,
        optimizers=(torch.optim.AdamW(param_groups(model, lr=2e-3, router_lr=4e-3)), None),
    )
    trainer.train()
    trainer.save_model(arguments.out)
    print(f"saved to {arguments.out}")


if __name__ == "__main__":
    main()
