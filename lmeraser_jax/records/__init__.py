"""Private, test and public images as records: where they come from and how they are kept."""
