"""What is seen of a hub: statistics, logs."""
