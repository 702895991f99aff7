"""The format on disk: columns, codec, manifest, pages, and the checks that read no more than they need."""
