"""What is kept about users: profiles and their history, samples for training, and erasing it all."""
