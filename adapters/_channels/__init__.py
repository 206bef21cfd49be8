"""Sets of channels that may change places, and orders in which N:M prunes less."""
