"""How long it takes to see that personal answers are better, and how often an interval sees what is not there."""
