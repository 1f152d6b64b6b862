"""Formulas of the criteria for layer removal.

Axes: T tokens, D width, V vocabulary.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor


def token_nll(logits_TV: Float[Tensor, "*t v"], targets_T: Int[Tensor, "*t"]) -> Float[Tensor, "*t"]:
    """Return -log p(target) of every token, in nats; exp of its mean is the perplexity (Shortened LLaMA)."""
    log_p = logits_TV.float().log_softmax(-1)
    return -log_p.gather(-1, targets_T[..., None])[..., 0]


def token_kl(full_TV: Float[Tensor, "*t v"], without_TV: Float[Tensor, "*t v"]) -> Float[Tensor, "*t"]:
    """Return KL(p_full || p_without) of every token's next-token distributions, in nats, from logits."""
    log_p, log_q = full_TV.float().log_softmax(-1), without_TV.float().log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def token_cosines(before_TD: Float[Tensor, "*t d"], after_TD: Float[Tensor, "*t d"]) -> Float[Tensor, "*t"]:
    """Return cos(h_l,t , h_{l+1},t) of every token; 1 - its mean is the block influence (ShortGPT, eq. 1)."""
    return torch.nn.functional.cosine_similarity(before_TD.float(), after_TD.float(), dim=-1)
