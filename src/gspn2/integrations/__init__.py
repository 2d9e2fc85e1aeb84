"""GSPN-2 inside other libraries' models; each integration imports one library, and needs its extra."""
