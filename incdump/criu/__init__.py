"""CRIU, the program: found, run, held on a leash, and quoted when it fails."""
