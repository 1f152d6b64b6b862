"""The layouts of other repositories that can be converted into a stock LLaVA: one entry for each model type."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import LlavaConfig, LlavaProcessor

from actors.checkpoint import bunny


@dataclass(frozen=True)
class Layout:
    """How a foreign layout becomes a stock one.

    config: from the entries of config.json, and its path. name: of a tensor, from its stored name; None: there is no
    such tensor. processor: from the folder, config.json's entries and the stock config; its tokenizer has "<image>".
    """

    config: Callable[[dict[str, Any], Path], LlavaConfig]
    name: Callable[[str], str | None]
    processor: Callable[[Path, dict[str, Any], LlavaConfig], LlavaProcessor]


LAYOUTS = {  # by config.json's model_type
    "bunny-phi": Layout(bunny.translate_config, bunny.translate_name, bunny.build_processor),
}
