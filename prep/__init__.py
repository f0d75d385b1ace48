"""prep: NWB recordings in, a Zarr token store out."""
