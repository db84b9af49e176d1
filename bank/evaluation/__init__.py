"""Evaluation: methods, people, losses, predictions and metrics, and their summary over users."""
