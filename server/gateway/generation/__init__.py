"""`POST /generate`: who speaks for the user, what the model is asked, and what it answers."""
