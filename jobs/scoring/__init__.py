"""What answers say about a model: metrics, paired differences, image controls."""
