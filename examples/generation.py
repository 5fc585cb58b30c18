"""Every way to write with a mixture: `generate`, its caches, beams, an assistant, a pipeline.

    python examples/generation.py

Runs offline on a tiny model that is drawn anew; `--model NAME --adapter FOLDER` takes a real
mixture. Nothing here knows of mixtures: it is transformers' own code.
"""

import argparse

import torch
from peft import PeftModel, get_peft_model
from small_model import counting, load
from transformers import PreTrainedTokenizerBase, TextStreamer, pipeline

from moelora import MoELoraConfig

CONFIG = MoELoraConfig(
    r=4,
    num_experts=4,
    target_modules="all-linear",
    task_type="CAUSAL_LM",
    # experts and routers that differ, as if they were trained
    init_lora_weights=False,
)


def written(
    model: PeftModel, tokenizer: PreTrainedTokenizerBase, prompts: list[str], **options: object
) -> list[str]:
    """What the model writes after each prompt, of all prompts in one batch."""
    inputs = tokenizer(prompts, return_tensors="pt", padding=True, return_token_type_ids=False).to(
        model.device
    )
    asked = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": tokenizer.pad_token_id}
    with torch.no_grad():
        ids = model.generate(**inputs, **{**asked, **options})
    return tokenizer.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def main() -> None:
    """Write the same texts in many ways."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="a model's name or folder; a tiny one is made without")
    parser.add_argument("--adapter", help="the folder of a saved mixture")
    arguments = parser.parse_args()

    base, tokenizer = load(arguments.model)
    tokenizer.padding_side = "left"
    if arguments.adapter is None:
        model = get_peft_model(base, CONFIG).eval()
    else:
        model = PeftModel.from_pretrained(base, arguments.adapter).eval()
    prompts = [counting(3, 1), counting(5, 4), counting(20, 7)]

    plain = written(model, tokenizer, prompts, use_cache=False)
    assistant, _ = load(arguments.model)
    ways = {
        "with a cache": written(model, tokenizer, prompts),
        "with a static cache": written(model, tokenizer, prompts, cache_implementation="static"),
        "each alone": [written(model, tokenizer, [prompt])[0] for prompt in prompts],
        "with an assistant": [
            written(model, tokenizer, [prompt], assistant_model=assistant)[0] for prompt in prompts
        ],
    }
    generate = pipeline("text-generation", model=model, tokenizer=tokenizer, batch_size=3)
    outputs = generate(prompts, max_new_tokens=8, do_sample=False, return_full_text=False)
    ways["by a pipeline"] = [output[0]["generated_text"] for output in outputs]
    for name, texts in ways.items():
        same = [text.split() for text in texts] == [text.split() for text in plain]
        print(f"{name}: {'as without a cache' if same else texts}")
    print("beams:", written(model, tokenizer, prompts, num_beams=3))
    print("sampled:", written(model, tokenizer, prompts, do_sample=True, top_p=0.9))
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    written(model, tokenizer, prompts[:1], streamer=streamer)


if __name__ == "__main__":
    main()
