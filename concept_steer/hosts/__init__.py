"""The only modules that touch a host: one file per host, each imports its host lazily."""
