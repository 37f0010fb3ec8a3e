"""Fast paths that must equal the plain path, chosen in one dispatch and switched by one set of flags."""
