"""What is done to users by hand."""
