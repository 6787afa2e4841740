"""What the methods share. Nothing in here knows a method."""
