"""The console: pages for people, in `static/`, and what only they ask for."""
