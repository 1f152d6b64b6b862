"""Greedy decoding of an exact number of tokens, plain or static; `tick` is called after each."""

from collections.abc import Callable

import torch
from transformers import StaticCache, StoppingCriteria

from actors.checkpoint.loading import layer_devices
from actors.specs import Llava

Tick = Callable[[], None]
# Entries of generation_config.json that change what `generate(do_sample=False)` returns: the values without effect.
NEUTRAL = {
    **dict.fromkeys(("repetition_penalty", "encoder_repetition_penalty", "guidance_scale", "num_beams"), 1),
    **dict.fromkeys(("no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "min_length", "min_new_tokens"), 0),
    **dict.fromkeys(("bad_words_ids", "suppress_tokens", "begin_suppress_tokens", "forced_bos_token_id")),
    **dict.fromkeys(("forced_eos_token_id", "sequence_bias", "exponential_decay_length_penalty", "stop_strings")),
    **dict.fromkeys(("force_words_ids", "constraints", "penalty_alpha", "dola_layers", "watermarking_config")),
}


def check_greedy(generation_config, path: str) -> None:
    """Raise ValueError if a checkpoint's generation config makes answers differ from plain greedy decoding."""
    for name, neutral in NEUTRAL.items():
        value = getattr(generation_config, name, None)
        if value not in (None, neutral, []):
            raise ValueError(
                f"{path!r} sets {name} to {value!r} in its generation_config.json, but answers are decoded greedily, "
                "without it: remove it there (for a hub's model, in a local copy)."
            )


class _Ticking(StoppingCriteria):
    def __init__(self, tick: Tick):
        self._tick = tick

    def __call__(self, input_ids, scores, **kwargs):
        self._tick()
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


class Plain:
    """The `generate` of transformers with its growing cache."""

    def __init__(self, model: Llava):
        self._model = model

    def __call__(self, inputs: dict, new_tokens: int, tick: Tick) -> list[int]:
        """Return the ids of `new_tokens` new tokens (no stop token among them) after one prompt."""
        out = self._model.generate(
            **inputs,
            min_new_tokens=new_tokens,
            max_new_tokens=new_tokens,
            do_sample=False,
            stopping_criteria=[_Ticking(tick)],
        )
        return out[0, inputs["input_ids"].shape[1] :].tolist()


class Static:
    """A static cache, and one decoding step that is captured once: a CUDA graph on a GPU, torch.compile on a CPU.

    A graph replays the model's own kernels, whatever the quantizer. A CPU has no graphs: there compiling saves the
    overhead. ValueError: sliding windows, several GPUs, or a step that cannot be captured.
    """

    def __init__(self, model: Llava):
        devices = set(layer_devices(model))
        if len(devices) > 1:
            raise ValueError(f"Static decoding supports one GPU, but the model is on {len(devices)}: {_PLAIN}")
        stop = model.generation_config.eos_token_id
        stops = [] if stop is None else [stop] if isinstance(stop, int) else list(stop)
        self._model, self._device = model, devices.pop()
        self._stops = torch.tensor(stops, dtype=torch.long, device=self._device)
        self._token = torch.zeros(1, 1, dtype=torch.long, device=self._device)
        self._length = 0

    @torch.inference_mode()
    def __call__(self, inputs: dict, new_tokens: int, tick: Tick) -> list[int]:
        """Return the same ids as `Plain`; the first call with prompts of another length captures the step anew."""
        length = inputs["input_ids"].shape[1] + new_tokens
        if length != self._length:
            self._capture(inputs, length)
        self._prefill(inputs)
        ids = [int(self._token)]
        tick()
        for _ in range(new_tokens - 1):
            self._replay()
            ids.append(int(self._token))
            tick()
        return ids

    def _prefill(self, inputs: dict) -> None:
        self._cache.reset()
        self._choose(**inputs)

    def _step(self) -> None:
        self._choose(input_ids=self._token)

    def _choose(self, **inputs) -> None:
        out = self._model(**inputs, past_key_values=self._cache, use_cache=True, logits_to_keep=1)
        logits_1V = out.logits[:, -1].index_fill(-1, self._stops, -torch.inf)
        self._token.copy_(logits_1V.argmax(-1, keepdim=True))

    def _capture(self, inputs: dict, length: int) -> None:
        self._cache = StaticCache(config=self._model.config, max_cache_len=length)
        if any(layer.is_sliding for layer in self._cache.layers):
            raise ValueError(f"Static decoding does not support sliding windows, which this model has: {_PLAIN}")
        self._prefill(inputs)  # allocates the cache, whose addresses stay the same from now on
        try:
            self._replay = self._graph() if self._device.type == "cuda" else self._compiled()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            reason = " ".join(str(error).split()).partition(" Set TORCH")[0][:200]
            raise ValueError(
                f"The decoding step could not be captured ({type(error).__name__}: {reason}). On a CPU torch.compile "
                f"needs a C++ compiler (g++); otherwise {_PLAIN}"
            ) from error
        self._length = length

    def _graph(self) -> Callable[[], None]:
        stream = torch.cuda.Stream(self._device)
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream):
            for _ in range(2):  # warm-up: a graph must not record the libraries' initialisation
                self._step()
        torch.cuda.current_stream(self._device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._step()
        return graph.replay

    def _compiled(self) -> Callable[[], None]:
        compiled = torch.compile(self._step, fullgraph=True)
        compiled()
        return compiled


_PLAIN = "set evaluate.decode plain."
DECODERS: dict[str, type[Plain] | type[Static]] = {"plain": Plain, "static": Static}
