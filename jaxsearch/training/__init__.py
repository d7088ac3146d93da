"""One training loop; what differs between stages is a task."""
