"""Dense formulas of recipes, with which tests compare engine and training."""
