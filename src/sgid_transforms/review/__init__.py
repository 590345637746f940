"""People judge variants in the browser: what ``sgid review`` serves."""
