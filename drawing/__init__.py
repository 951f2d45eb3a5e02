"""Pictures: `grids` of kernels, maps and images in NumPy, `plots` in Matplotlib, and the `page` that shows them."""
