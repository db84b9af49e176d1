"""What is kept, behind ports: each with its port, its values as bytes, and its way to Redis."""
