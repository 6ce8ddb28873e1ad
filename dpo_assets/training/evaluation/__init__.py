"""What is asked of each model under judgement, by whom it is answered, and what the answers add up to."""
