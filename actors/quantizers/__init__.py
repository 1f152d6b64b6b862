"""Quantizers: each turns a checkpoint folder into a smaller one; only the decoder's linears are rounded."""
