"""Quantizers: each turns a checkpoint folder into a smaller one; the language model's linears alone are rounded."""
