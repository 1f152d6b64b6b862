"""Answers by vLLM, run by .venv-vllm's Python: one process for many checkpoints, because vLLM takes long to import.

Reads a JSON list of {path, dtype, prompt, image, tokens} from the first file; writes the list of greedy token ids, or
of vLLM's last line of error (a string), to the second.
"""

import gc
import json
import sys
from pathlib import Path

from PIL import Image
from vllm import LLM, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory


def answer(item: dict) -> list[int] | str:
    """Return the ids of one greedy answer, or why vLLM refuses the checkpoint."""
    try:
        llm = LLM(model=item["path"], dtype=item["dtype"], max_model_len=256, max_num_seqs=4, enforce_eager=True)
        prompt = {
            "prompt": item["prompt"],
            "multi_modal_data": {"image": Image.open(item["image"]).convert("RGB")},
        }
        greedy = SamplingParams(temperature=0, max_tokens=item["tokens"])
        return list(llm.generate(prompt, greedy, use_tqdm=False)[0].outputs[0].token_ids)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    finally:
        llm = None
        gc.collect()
        cleanup_dist_env_and_memory()


if __name__ == "__main__":
    items = json.loads(Path(sys.argv[1]).read_text())
    Path(sys.argv[2]).write_text(json.dumps([answer(item) for item in items]))
