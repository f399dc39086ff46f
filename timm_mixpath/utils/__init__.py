"""What all rooms use, and nothing of architecture search."""
