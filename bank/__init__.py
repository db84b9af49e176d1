"""The bank of anchors: who they are, how a user finds them, and how the bank is built and checked."""
