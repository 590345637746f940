"""From "variant 2 of this image" to a stored variant: in this process, in the service, or over a whole folder."""
