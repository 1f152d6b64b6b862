"""What a decoder layer is worth: pure formulas of the criteria for layer removal.

Axes: T tokens, D width, V vocabulary, L layers.
"""

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

# Modified z-score above which a value is an outlier, and the factors that scale it (Iglewicz and Hoaglin 1993).
OUTLIER_Z, MAD_SCALE, MEAN_SCALE = 3.5, 1.4826, 1.2533


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


def loss_outliers(losses_L: Float[np.ndarray, "l"]) -> Bool[np.ndarray, "l"]:
    """Tell which layers' single removal costs far more than the others' (one-sided modified z-score above 3.5).

    losses_L: mean negative log-likelihood without layer l (nats per token), i.e. the logarithm of the perplexity.
    The z-score is (x - median) / (1.4826 MAD); where more than half of the values are equal, the mean absolute
    deviation stands in for the median one. A loss that is not finite is an outlier.
    """
    finite = losses_L[np.isfinite(losses_L)]
    away = losses_L - np.median(finite)
    spread = MAD_SCALE * np.median(np.abs(finite - np.median(finite)))
    if spread == 0:
        spread = MEAN_SCALE * np.mean(np.abs(finite - np.median(finite)))
    return ~np.isfinite(losses_L) | ((away > OUTLIER_Z * spread) & (away > 0))
