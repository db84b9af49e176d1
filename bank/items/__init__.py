"""Read and check people's items, and turn them into training pairs and prompts."""
