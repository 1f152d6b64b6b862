"""The linear map that stands in for removed layers (ReplaceMe, Shopkhoev et al. 2025). Axes: T tokens, D width."""

import torch
from jaxtyping import Float
from torch import Tensor


class LinearFit:
    """Least squares X W = Y over tokens that come in parts: only two sums of [D, D] are held, in float64."""

    def __init__(self, width: int, device: torch.device):
        self._gram_DD = torch.zeros(width, width, dtype=torch.float64, device=device)
        self._cross_DD = torch.zeros_like(self._gram_DD)
        self._square = 0.0  # |Y|^2

    def add(self, inputs_TD: Float[Tensor, "t d"], targets_TD: Float[Tensor, "t d"]) -> None:
        """Count tokens in."""
        inputs_TD, targets_TD = inputs_TD.double(), targets_TD.double()
        self._gram_DD += inputs_TD.T @ inputs_TD
        self._cross_DD += inputs_TD.T @ targets_TD
        self._square += float(targets_TD.square().sum())

    def solve(self, ridge: float) -> Float[Tensor, "d d"]:
        """Return W that minimises |X W - Y|^2 + lambda |W - 1|^2, lambda = ridge times the mean square of X's columns.

        The penalty draws W to the identity, which is what a cut without a map has; so few tokens do no harm.
        """
        penalty = ridge * self._gram_DD.diagonal().mean()
        identity_DD = torch.eye(len(self._gram_DD), dtype=torch.float64, device=self._gram_DD.device)
        return torch.linalg.solve(self._gram_DD + penalty * identity_DD, self._cross_DD + penalty * identity_DD)

    def error(self, map_DD: Float[Tensor, "d d"]) -> float:
        """Return |X W - Y|^2 as a share of |X - Y|^2, which a cut without a map leaves."""
        identity_DD = torch.eye(len(self._gram_DD), dtype=torch.float64, device=self._gram_DD.device)
        return self._squared_error(map_DD) / self._squared_error(identity_DD)

    def _squared_error(self, map_DD: Tensor) -> float:
        fitted = (self._gram_DD @ map_DD * map_DD).sum() - 2 * (self._cross_DD * map_DD).sum()
        return float(fitted) + self._square
