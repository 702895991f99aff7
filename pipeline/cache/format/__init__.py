"""The on-disk format: columns, codec, manifest, and checks of untrusted files."""
