"""What a host should be: one file a service, in the order `vps.py` calls them."""
