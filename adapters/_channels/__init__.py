"""Channels that may change places, and the order of which N:M prunes less."""
