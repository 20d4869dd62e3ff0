"""What people do with influence."""
