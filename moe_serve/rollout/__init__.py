"""Moving traffic between the variants, with a record of who moved it and why."""
