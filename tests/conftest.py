"""Puts this folder on the path, so that tests in its sub-folders, and the processes they start, find the shared fakes."""
