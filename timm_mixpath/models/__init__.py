"""Networks and supernets, what they cost, and where their weights come from."""
