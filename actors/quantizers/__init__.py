"""Quantizers: each turns a checkpoint folder into a 4-bit one; the language model's linears alone are rounded."""
