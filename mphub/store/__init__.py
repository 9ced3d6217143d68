"""What is kept: the journal, the progress boards, the blob files."""
