"""A language model as the judge of answers: rubric scores, and comparisons of two models."""
