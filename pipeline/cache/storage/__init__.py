"""File storage of a cache: atomic writes on local disks, and transfers to and from URLs."""
