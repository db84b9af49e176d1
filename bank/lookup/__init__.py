"""What a gateway needs of a bank: who is near whom, and with which weights anchors speak for a user."""
