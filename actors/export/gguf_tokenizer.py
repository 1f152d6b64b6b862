"""The tokenizer and the chat template inside a GGUF file.

Source: conversion/base.py (keys, kinds of tokens), src/llama-vocab.cpp (how they are used, and the names of the
patterns that split a text) and common/chat.cpp (what a chat template gets) of github.com/ggml-org/llama.cpp.
"""

import json
from pathlib import Path

import gguf

# llama.cpp puts a marker of its own, <__media_...__>, into the text where an image was. Templates look for a part
# "image" and print the image token: the head takes the text apart again, the tail puts the marker where the token is.
_BEFORE = """{%- set found = namespace(messages=[], marker='<image>') -%}
{%- for message in messages -%}
{%- set now = namespace(text='', parts=[]) -%}
{%- if message['content'] is string -%}
{%- set now.text = message['content'] -%}
{%- elif message['content'] -%}
{%- for part in message['content'] -%}
{%- set now.text = now.text + part['text'] -%}
{%- endfor -%}
{%- endif -%}
{%- if '<__media' in now.text -%}
{%- set found.marker = '<__media' + now.text.split('<__media')[1].split('__>')[0] + '__>' -%}
{%- endif -%}
{%- for text in now.text.split(found.marker) -%}
{%- if not loop.first -%}
{%- set now.parts = now.parts + [{'type': 'image'}] -%}
{%- endif -%}
{%- set now.parts = now.parts + [{'type': 'text', 'text': text}] -%}
{%- endfor -%}
{%- set found.messages = found.messages + [{'role': message['role'], 'content': now.parts}] -%}
{%- endfor -%}
{%- set messages = found.messages -%}
{%- set prompt %}"""
_AFTER = "{% endset -%}{{- prompt | replace('<image>', found.marker) -}}"
_BYTES = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
_QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA3 = _QWEN2.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
SPLITS: dict[str, list[dict]] = {
    "gpt-2": [_BYTES],
    "smollm": [{"type": "Digits", "individual_digits": True}, _BYTES],
    "qwen2": [{"type": "Split", "pattern": {"Regex": _QWEN2}}, {**_BYTES, "use_regex": False}],
    "llama-bpe": [{"type": "Split", "pattern": {"Regex": _LLAMA3}}, {**_BYTES, "use_regex": False}],
}  # how a tokenizer splits a text, by llama.cpp's name for it


def chat_template(template: str) -> str:
    """Return a LLaVA's chat template such that llama.cpp, with its media markers, renders the same prompts."""
    return _BEFORE + template.removesuffix("\n") + _AFTER


def split_name(pre_tokenizer: dict | None) -> str:
    """Return llama.cpp's name of a tokenizer.json's pre_tokenizer; ValueError: it has none."""
    steps: list = (pre_tokenizer or {}).get("pretokenizers", [pre_tokenizer])
    for name, wanted in SPLITS.items():
        if len(steps) == len(wanted) and all(
            isinstance(step, dict) and all(step.get(key) == value for key, value in each.items())
            for step, each in zip(steps, wanted, strict=True)
        ):
            return name
    raise ValueError(
        f"llama.cpp splits texts by name, and none here is known for {json.dumps(pre_tokenizer)[:300]}: "
        f"{', '.join(SPLITS)} are (actors/export/gguf_tokenizer.py)."
    )


def write_vocabulary(writer: gguf.GGUFWriter, folder: Path, processor, rows: int) -> None:
    """Write the tokenizer of a checkpoint whose embeddings have `rows` rows, and its chat template.

    ValueError: no tokenizer.json, or one that llama.cpp cannot follow.
    """
    tokenizer, file = processor.tokenizer, folder / "tokenizer.json"
    if not file.is_file():
        raise ValueError(
            f"{str(folder)!r} has no tokenizer.json: save the processor with transformers' fast tokenizer."
        )
    stored = json.loads(file.read_text(encoding="utf-8"))
    model, normalizer = stored["model"], stored.get("normalizer")
    if model["type"] != "BPE":
        raise ValueError(
            f"Tokenizers of type BPE are exported, not {model['type']} (tokenizer.json of {str(folder)!r})."
        )
    merges = [pair if isinstance(pair, list) else pair.split(" ") for pair in model["merges"]]
    tokens, kinds = _tokens(stored, tokenizer, rows)
    if model.get("byte_fallback"):
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_scores(_scores(tokens, merges))
        writer.add_add_space_prefix(_prefixes_space(stored))
    else:
        if normalizer not in (None, {"type": "NFC"}):
            raise ValueError(
                f"llama.cpp does not normalise texts as this tokenizer does: {json.dumps(normalizer)[:200]}"
            )
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(split_name(stored["pre_tokenizer"]))
        writer.add_token_merges([" ".join(pair) for pair in merges])
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    _write_special(writer, folder, tokenizer)
    writer.add_chat_template(chat_template(processor.chat_template))


def _tokens(stored: dict, tokenizer, rows: int) -> tuple[list[str], list[int]]:
    """Return (tokens, their kinds) for every row of the embeddings; rows without a token are marked as unused."""
    known = {number: token for token, number in stored["model"]["vocab"].items()}
    added = {entry["id"]: entry for entry in stored["added_tokens"]}
    known |= {number: entry["content"] for number, entry in added.items()}
    if max(known) >= rows:
        raise ValueError(f"The tokenizer has a token {max(known)}, but the embeddings have {rows} rows.")
    kinds = []
    for number in range(rows):
        token = known.setdefault(number, f"[PAD{number}]")
        if number in added:
            kind = gguf.TokenType.CONTROL if added[number]["special"] else gguf.TokenType.USER_DEFINED
        elif token == f"[PAD{number}]":
            kind = gguf.TokenType.UNUSED
        elif token.startswith("<0x") and len(token) == 6 and stored["model"].get("byte_fallback"):
            kind = gguf.TokenType.BYTE
        else:
            kind = gguf.TokenType.NORMAL
        if token == stored["model"].get("unk_token"):
            kind = gguf.TokenType.UNKNOWN
        kinds.append(int(kind))
    return [known[number] for number in range(rows)], kinds


def _scores(tokens: list[str], merges: list[list[str]]) -> list[float]:
    """Return the score of every token: llama.cpp joins the pair whose result has the highest.

    A result's rank is that of the first merge that makes it. ValueError: its merges do not stand together, so that no
    scores give the same order.
    """
    results = ["".join(pair) for pair in merges]
    ranks: dict[str, int] = {}
    for rank, result in enumerate(results):
        if result in ranks and results[rank - 1] != result:
            raise ValueError(
                f"The merges that make {result!r} do not stand together: llama.cpp has one score for a token."
            )
        ranks.setdefault(result, rank)
    return [-float(ranks.get(token, len(merges))) for token in tokens]


def _prefixes_space(stored: dict) -> bool:
    steps = [stored.get("normalizer") or {}, stored.get("pre_tokenizer") or {}]
    flat = [part for step in steps for part in step.get("normalizers", step.get("pretokenizers", [step]))]
    return any(
        (part.get("type") == "Prepend" and part.get("prepend") == "\u2581")
        or (part.get("type") == "Metaspace" and part.get("prepend_scheme", "always") != "never")
        for part in flat
    )


def _write_special(writer: gguf.GGUFWriter, folder: Path, tokenizer) -> None:
    file = folder / "generation_config.json"
    ends = (json.loads(file.read_text()) if file.is_file() else {}).get("eos_token_id", tokenizer.eos_token_id)
    ends = ends if isinstance(ends, list) else [ends]
    if not 1 <= len(ends) <= 2 or ends[0] is None:
        raise ValueError(f"An answer ends with one or two tokens in a GGUF file, not {ends} (eos_token_id).")
    writer.add_eos_token_id(ends[0])
    if len(ends) == 2:
        writer.add_eot_token_id(ends[1])
    begin = tokenizer.bos_token_id
    if begin is not None:
        writer.add_bos_token_id(begin)
    if tokenizer.pad_token_id is not None:
        writer.add_pad_token_id(tokenizer.pad_token_id)
    if tokenizer.unk_token_id is not None:
        writer.add_unk_token_id(tokenizer.unk_token_id)
    around = tokenizer("a").input_ids
    writer.add_add_bos_token(begin is not None and around[0] == begin)
    writer.add_add_eos_token(False)
