"""How a cohort's work is done on this machine. One engine a file; all give the same answer."""
