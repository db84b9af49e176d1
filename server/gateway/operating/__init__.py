"""What operators ask a gateway: whether its parts can serve, and what it has counted."""
