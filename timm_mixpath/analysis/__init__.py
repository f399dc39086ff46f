"""Can a supernet be trusted: how it ranks archs, how alike its paths are."""
