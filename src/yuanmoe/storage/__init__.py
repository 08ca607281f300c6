"""Whatever is on disk is whole or not there: folders, JSON files, manifests and run folders. Not what is in them."""
