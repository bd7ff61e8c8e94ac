"""The signal store: the only room that knows Zarr, codecs and manifests."""
