"""Find the files of a data set (local, behind a URL, or on the hub) and read them as rows."""
