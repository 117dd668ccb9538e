"""Stores: SQLite for one machine, PostgreSQL and Azure Cosmos DB for many servers."""
