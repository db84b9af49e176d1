"""What limits and queues count on Redis."""
