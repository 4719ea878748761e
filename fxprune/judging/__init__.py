"""What networks answer, and what users' own measures say of them: agreement, accuracy, a function of theirs."""
