"""What a machine has to do for a run: one command measures it and says what fails."""
