"""Bits or removal, layer by layer, under one budget."""
