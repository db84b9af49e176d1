"""`mta bank build`: select anchors, train their rows, measure the curvature, write the bank."""
