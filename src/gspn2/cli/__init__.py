"""The `gspn2` command: one module a subcommand, imported when it is asked for."""
