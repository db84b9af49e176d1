"""The demo: a small bank of made-up people whose manners anyone can tell apart (`python -m deploy.demo`)."""
