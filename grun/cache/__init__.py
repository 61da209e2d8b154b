"""The engine that runs only what an edit can change, and the cache of the rest."""
