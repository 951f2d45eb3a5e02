"""Where images come from (`sources`), how they are stored (`records`), and a generated set (`shapes`)."""
