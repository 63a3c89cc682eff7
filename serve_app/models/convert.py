"""`python -m serve_app.models.convert <gguf file> <folder>`: GGUF to bf16 safetensors.

Loads torch and transformers, so `serve_app.models.fetch` runs it as a process of its own.
"""

from __future__ import annotations

import sys
from pathlib import Path


def convert(source: Path, folder: Path) -> None:
    """Write `source` into `folder` as safetensors, then load it back to prove it whole."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where = {"gguf_file": source.name}
    tokenizer = AutoTokenizer.from_pretrained(str(source.parent), **where)
    model = AutoModelForCausalLM.from_pretrained(str(source.parent), dtype=torch.bfloat16, **where)
    # transformers still takes the weights for quantised after it has unpacked them.
    model.hf_quantizer = None
    del model.config.quantization_config
    model.save_pretrained(str(folder))
    tokenizer.save_pretrained(str(folder))
    check(folder)


def check(folder: Path) -> None:
    """Fail unless `folder` loads and knows how to write a conversation."""
    from transformers import AutoConfig, AutoTokenizer

    AutoConfig.from_pretrained(str(folder))
    tokenizer = AutoTokenizer.from_pretrained(str(folder))
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hello"}], tokenize=False, add_generation_prompt=True
    )
    if "Hello" not in text or not any(folder.glob("*.safetensors")):
        raise SystemExit(f"{folder} holds no complete model")


if __name__ == "__main__":
    convert(Path(sys.argv[1]), Path(sys.argv[2]))
