"""What is kept of users: profiles and their history, samples for training, and erasing it all."""
