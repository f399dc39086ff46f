"""What leaves the machine: model folders, cards, repos."""
