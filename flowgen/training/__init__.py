"""Training and what it leaves behind: floor 3."""
