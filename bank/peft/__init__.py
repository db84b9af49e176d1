"""Adapters as PEFT has them, in and out."""
