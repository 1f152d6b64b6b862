"""Compute: plain classes that hold a model in memory, and the functions they call. Never imports ray."""

import logging
import os

# Notices of optional kernels and fallbacks that say nothing about the user's work.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
for _name in ("torchao", "torch.utils._pytree"):
    logging.getLogger(_name).setLevel(logging.ERROR)
