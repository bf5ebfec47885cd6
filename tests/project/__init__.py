"""The checkout as a whole: layers, packages, README, Docker, CI."""
