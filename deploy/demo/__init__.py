"""The demo: a small bank of made-up people with clearly different manners of writing (`python -m deploy.demo`)."""
