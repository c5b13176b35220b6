"""What the documentation's tables come from: every figure is measured by one command that anyone can run again."""
