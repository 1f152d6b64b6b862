"""The joint choice: removal or bits for every layer, under one budget."""
