"""What the evaluation suites measure, and with which rules."""
