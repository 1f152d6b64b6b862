"""derm-tiny: a small drawn world of skin lesions, and the small LLaVA that was trained on it."""
