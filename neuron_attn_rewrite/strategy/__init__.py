"""Which kernel a site gets, and why."""
