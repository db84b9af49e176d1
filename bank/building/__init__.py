"""`mta bank build`: select anchors, train their rows, calibrate, assemble."""
