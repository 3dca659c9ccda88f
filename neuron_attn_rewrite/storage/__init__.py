"""A rewritten model as one file. No part of a file is run as code: each is checked against a list."""
