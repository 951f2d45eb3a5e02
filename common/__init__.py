"""What every room may use: mistakes, exits and signals, command lines, this machine."""
