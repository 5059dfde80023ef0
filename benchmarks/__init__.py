"""How fast whole rounds are, and how near that is to the machine's limit and to other frameworks."""
