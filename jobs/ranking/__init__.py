"""Which layers matter: criteria, their measurements, sets of layers."""
