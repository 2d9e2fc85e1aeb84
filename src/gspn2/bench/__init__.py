"""The bench: the figures of the papers, measured again, checked, drawn. `gspn2 bench` is its front."""
