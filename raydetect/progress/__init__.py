"""Progress of long steps on standard error: a live display on a terminal, plain lines elsewhere, and never silence."""
