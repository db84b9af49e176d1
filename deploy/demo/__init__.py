"""The demo: a small bank of made-up people with manners that anyone can tell apart (`python -m deploy.demo`)."""
