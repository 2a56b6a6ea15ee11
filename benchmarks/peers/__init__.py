"""Other servers, started with the same members executed the same way, to compare with in the same run."""
