"""What a gateway needs from a bank: which anchors are near a user, and with which weights they speak for them."""
