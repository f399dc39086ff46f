"""What can be chosen: archs, search spaces, sampling. No torch."""
