"""Valkey as operators run it for many: a cluster, and a primary that Sentinels watch."""
