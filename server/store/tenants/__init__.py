"""Tenants: the keys by which they call, and the names of their users."""
