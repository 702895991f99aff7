"""Where the files of a cache are kept: local disks, URLs, and the commit protocol."""
