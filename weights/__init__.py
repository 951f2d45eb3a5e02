"""Weights of other programs: what their files hold, in the names and the layout of this project, and the way back."""
