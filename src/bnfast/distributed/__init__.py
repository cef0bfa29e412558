"""One layer on several processes: engines' communicators."""
