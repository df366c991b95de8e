"""What is suspicious about the rows, before anybody pays for training on them."""
