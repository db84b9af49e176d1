"""Lookups in a bank by a gateway: the anchors near a user, and their weights."""
