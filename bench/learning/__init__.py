"""Learning from use: its rate, what it gains, and how long it takes to see that personal answers are better."""
