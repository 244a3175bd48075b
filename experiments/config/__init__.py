"""The run configuration: schema, aliases, composition, validation."""
