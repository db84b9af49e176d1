"""The measuring instrument: methods, people, losses, predictions and metrics, and what they come to over users."""
