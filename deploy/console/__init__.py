"""A browser for the console, and pictures of its pages."""
