"""A tiny random Bunny in its published layout, and Bunny's arithmetic on the stored tensors alone, without our code."""

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch.nn import functional as F
from transformers import PreTrainedTokenizerFast

from actors.derm_tiny.build import build_processor

# The published config.json's entries that shape the model.
PUBLISHED = {
    "model_type": "bunny-phi",
    "architectures": ["BunnyPhiForCausalLM"],
    "auto_map": {"AutoModelForCausalLM": "modeling_bunny_phi.BunnyPhiForCausalLM"},
    "bos_token_id": 50256,
    "eos_token_id": 50256,
    "pad_token_id": 50256,
    "hidden_act": "gelu_new",
    "hidden_size": 2560,
    "image_aspect_ratio": "pad",
    "intermediate_size": 10240,
    "layer_norm_eps": 1e-05,
    "max_position_embeddings": 2048,
    "mm_hidden_size": 1152,
    "mm_projector_type": "mlp2x_gelu",
    "mm_vision_tower": "google/siglip-so400m-patch14-384",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 32,
    "partial_rotary_factor": 0.4,
    "qk_layernorm": False,
    "resid_pdrop": 0.1,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "vocab_size": 50295,
}
WIDTH, MLP, LAYERS, HEADS = 40, 96, 4, 2  # heads of 20 numbers, 8 of which are rotated
TOWER, TOWER_MLP, TOWER_LAYERS, SIDE, PATCH = 32, 48, 3, 56, 16  # 56 is no multiple of 16, as 384 is none of 14
PATCHES = (SIDE // PATCH) ** 2
VISION, END = "model.vision_tower.vision_tower.vision_model.", "<|endoftext|>"
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions."
)


def published_shapes(config: dict, tower: dict) -> dict[str, tuple[int, ...]]:
    """Return names and shapes of Bunny's tensors, in the order of its modules."""
    width, mlp, vocabulary = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    side, small = tower["hidden_size"], tower["intermediate_size"]
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, width)}

    def linear(name: str, out: int, in_: int) -> None:
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (out, in_), (out,)

    def norm(name: str, size: int) -> None:
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (size,), (size,)

    for number in range(config["num_hidden_layers"]):
        layer = f"model.layers.{number}."
        for part in ("q_proj", "k_proj", "v_proj", "dense"):
            linear(f"{layer}self_attn.{part}", width, width)
        linear(f"{layer}mlp.fc1", mlp, width)
        linear(f"{layer}mlp.fc2", width, mlp)
        norm(f"{layer}input_layernorm", width)
    norm("model.final_layernorm", width)
    shapes[f"{VISION}embeddings.patch_embedding.weight"] = (side, 3, tower["patch_size"], tower["patch_size"])
    shapes[f"{VISION}embeddings.patch_embedding.bias"] = (side,)
    shapes[f"{VISION}embeddings.position_embedding.weight"] = (
        (tower["image_size"] // tower["patch_size"]) ** 2,
        side,
    )
    for number in range(tower["num_hidden_layers"] - 1):
        layer = f"{VISION}encoder.layers.{number}."
        for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
            linear(f"{layer}self_attn.{part}", side, side)
        linear(f"{layer}mlp.fc1", small, side)
        linear(f"{layer}mlp.fc2", side, small)
        norm(f"{layer}layer_norm1", side)
        norm(f"{layer}layer_norm2", side)
    norm(f"{VISION}post_layernorm", side)
    linear("model.mm_projector.0", width, side)
    linear("model.mm_projector.2", width, width)
    shapes["lm_head.weight"] = (vocabulary, width)
    return shapes


def save_bunny(root: Path) -> Path:
    """Write a tiny Bunny, and its tower's config beside it, as its training code has them; return its folder."""
    folder, tower = root / "bunny", root / "tower"
    folder.mkdir(parents=True)
    tower.mkdir()
    vision = {
        "model_type": "siglip_vision_model",
        "hidden_size": TOWER,
        "intermediate_size": TOWER_MLP,
        "num_hidden_layers": TOWER_LAYERS,
        "num_attention_heads": 2,
        "image_size": SIDE,
        "patch_size": PATCH,
    }
    (tower / "config.json").write_text(json.dumps(vision))
    entries = json.loads(build_processor().tokenizer.backend_tokenizer.to_str())
    entries["added_tokens"], entries["post_processor"] = [], None  # as in CodeGen: no <image>, nothing before a text
    entries["model"]["vocab"]["<unused>"] = entries["model"]["vocab"].pop("<image>")
    plain = Tokenizer.from_str(json.dumps(entries))
    fast = PreTrainedTokenizerFast(tokenizer_object=plain, eos_token=END, bos_token=END, unk_token=END)
    fast.save_pretrained(folder)
    config = {
        **PUBLISHED,
        "hidden_size": WIDTH,
        "intermediate_size": MLP,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS,
        "mm_hidden_size": TOWER,
        "mm_vision_tower": str(tower),
        "torch_dtype": "float32",
        "vocab_size": len(fast),
        **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), fast.eos_token_id),
    }
    (folder / "config.json").write_text(json.dumps(config))
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, shape in published_shapes(config, vision).items():
        drawn = torch.randn(shape, generator=generator)
        scale = 1.2 / drawn[0].numel() ** 0.5 if len(shape) > 1 else 0.2
        tensors[name] = drawn * scale + (1.0 if "norm" in name and name.endswith(".weight") else 0.0)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def prompt(question: str) -> str:
    """Return the prompt of the published README."""
    return f"{SYSTEM} USER: <image>\n{question} ASSISTANT:"


def pixels(image: Image.Image) -> torch.Tensor:
    """Return the image, padded to a square with mid-grey, resized, and scaled to -1 ... 1: [1, 3, SIDE, SIDE]."""
    side = max(image.size)
    square = Image.new("RGB", (side, side), (127, 127, 127))
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    values = np.asarray(square.resize((SIDE, SIDE), Image.Resampling.BICUBIC), dtype=np.float32) / 255
    return torch.from_numpy((values - 0.5) / 0.5).permute(2, 0, 1)[None]


def logits(folder: Path, image: Image.Image, question: str) -> torch.Tensor:
    """Return the logits after every place of the published prompt about an image: [places, vocabulary]."""
    tensors = load_file(folder / "model.safetensors")

    def linear(name: str, x: torch.Tensor) -> torch.Tensor:
        return x @ tensors[f"{name}.weight"].T + tensors[f"{name}.bias"]

    def norm(name: str, x: torch.Tensor, eps: float) -> torch.Tensor:
        return F.layer_norm(x, x.shape[-1:], tensors[f"{name}.weight"], tensors[f"{name}.bias"], eps)

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool) -> torch.Tensor:
        scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
        if causal:
            scores = scores.masked_fill(torch.ones(scores.shape[-2:]).triu(1).bool(), float("-inf"))
        return (scores.softmax(-1) @ v).transpose(0, 1).flatten(1)

    def heads(x: torch.Tensor, count: int) -> torch.Tensor:
        return x.view(len(x), count, -1).transpose(0, 1)

    patches = F.unfold(pixels(image)[..., : SIDE // PATCH * PATCH, : SIDE // PATCH * PATCH], PATCH, stride=PATCH)[0].T
    embeddings = f"{VISION}embeddings."
    hidden = patches @ tensors[f"{embeddings}patch_embedding.weight"].flatten(1).T
    hidden = hidden + tensors[f"{embeddings}patch_embedding.bias"] + tensors[f"{embeddings}position_embedding.weight"]
    for number in range(TOWER_LAYERS - 1):  # all but the last one, and no norm after them
        layer = f"{VISION}encoder.layers.{number}."
        x = norm(f"{layer}layer_norm1", hidden, 1e-6)
        q, k, v = (heads(linear(f"{layer}self_attn.{part}_proj", x), 2) for part in "qkv")
        hidden = hidden + linear(f"{layer}self_attn.out_proj", attend(q, k, v, causal=False))
        x = norm(f"{layer}layer_norm2", hidden, 1e-6)
        hidden = hidden + linear(f"{layer}mlp.fc2", F.gelu(linear(f"{layer}mlp.fc1", x), approximate="tanh"))
    features = linear("model.mm_projector.2", F.gelu(linear("model.mm_projector.0", hidden)))

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    before, after = (
        F.embedding(torch.tensor(tokenizer.encode(text).ids), tensors["model.embed_tokens.weight"])
        for text in prompt(question).split("<image>")
    )
    hidden = torch.cat([before, features, after])
    places, rotated = torch.arange(len(hidden)), int(0.4 * WIDTH // HEADS)
    angles = places[:, None] / 10000 ** (torch.arange(0, rotated, 2) / rotated)

    def rotate(x: torch.Tensor) -> torch.Tensor:
        one, two, rest = x.split([rotated // 2, rotated // 2, x.shape[-1] - rotated], -1)
        cos, sin = angles.cos(), angles.sin()
        return torch.cat([one * cos - two * sin, two * cos + one * sin, rest], -1)

    for number in range(LAYERS):  # attention and MLP beside each other
        layer = f"model.layers.{number}."
        x = norm(f"{layer}input_layernorm", hidden, 1e-5)
        q, k, v = (heads(linear(f"{layer}self_attn.{part}_proj", x), HEADS) for part in "qkv")
        attention = linear(f"{layer}self_attn.dense", attend(rotate(q), rotate(k), v, causal=True))
        mlp = linear(f"{layer}mlp.fc2", F.gelu(linear(f"{layer}mlp.fc1", x), approximate="tanh"))
        hidden = hidden + attention + mlp
    return norm("model.final_layernorm", hidden, 1e-5) @ tensors["lm_head.weight"].T
