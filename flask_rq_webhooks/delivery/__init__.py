"""What is sent: ingest, dispatcher, transport and limits. The only HTTP sender of the package."""
