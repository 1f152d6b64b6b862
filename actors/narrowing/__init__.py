"""Width pruning: fewer attention heads and MLP channels in every decoder layer."""
