"""What people see: the terminal, pictures, and pages for a browser."""
