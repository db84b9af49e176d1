"""Evaluation of a bank: methods, losses, predictions, metrics, and their summary over users."""
