"""Log-probabilities of answers: the head, the one scorer, and the reference's scores."""
