"""What people have written: read, checked, turned into pairs to train on and into prompts."""
