"""The page, as files for browsers, and what serves them; not here: the routes of the API."""
