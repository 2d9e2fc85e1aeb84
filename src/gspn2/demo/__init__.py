"""What `gspn2 demo` does: two trainings side by side, a look inside one of them, costs, and a report."""
