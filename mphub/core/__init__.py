"""What is decided, pure: keys, routing, delivery, credit, restarts. No clock, process, socket or file."""
