"""Several machines for real: network namespaces, each with an address of its own."""
