"""The cache service of a node: gRPC server, credentials, the arena's leases. Imports no torch."""
