"""The web console: its pages in `static/` and the routes that only they use."""
