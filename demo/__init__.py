"""The tour of `mta demo`: what an app does with a running server, through its client alone."""
