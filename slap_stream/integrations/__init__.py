"""Training loops of other libraries that slap_stream plugs into."""
