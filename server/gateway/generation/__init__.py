"""Generation: choose the user's recipe, build the prompt and collect the answer."""
