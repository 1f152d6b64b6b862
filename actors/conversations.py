"""Training conversations as tensors: the chat template's prompt, then the answer, whose tokens are the targets."""

from collections.abc import Sequence

import torch

from actors.images import open_image
from actors.specs import Conversation


def reply_ids(tokenizer, reference: str) -> list[int]:
    """Return the target tokens of a reference answer: its own, and the end-of-sequence token."""
    return [*tokenizer(" " + reference, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]


def collate(processor, conversations: Sequence[Conversation]) -> dict[str, torch.Tensor]:
    """Return input_ids, attention_mask, labels [B, T] (-100: no loss) and, if there are images, pixel_values.

    The chat template makes the prompt; the labels are `reply_ids`. Padded on the right, so that positions are those of
    an unpadded row.
    """
    tokenizer = processor.tokenizer
    rows, pixels = [], []
    for item in conversations:
        image = [] if item.image is None else [{"type": "image"}]
        turn = [{"role": "user", "content": [*image, {"type": "text", "text": item.question}]}]
        prompt = processor.apply_chat_template(turn, add_generation_prompt=True)
        images = {"images": open_image(item.image)} if item.image is not None else {}
        inputs = processor(**images, text=prompt, return_tensors="pt")
        reply = reply_ids(tokenizer, item.reference)
        rows.append((inputs["input_ids"][0], torch.tensor(reply)))
        if item.image is not None:
            pixels.append(inputs["pixel_values"])
    longest = max(len(prompt) + len(reply) for prompt, reply in rows)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    ids = torch.full((len(rows), longest), pad)
    mask = torch.zeros_like(ids)
    labels = torch.full_like(ids, -100)
    for row, (prompt, reply) in enumerate(rows):
        end = len(prompt) + len(reply)
        ids[row, :end] = torch.cat([prompt, reply])
        mask[row, :end] = 1
        labels[row, len(prompt) : end] = reply
    pixel_values = {"pixel_values": torch.cat(pixels)} if pixels else {}
    return {"input_ids": ids, "attention_mask": mask, "labels": labels, **pixel_values}
