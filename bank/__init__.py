"""The bank of anchors: building it, looking up a user's anchors, and evaluating it."""
