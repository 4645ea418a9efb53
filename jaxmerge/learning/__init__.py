"""Learning a method's coefficients: the loop, its objectives, and the constraints on what it learns."""
