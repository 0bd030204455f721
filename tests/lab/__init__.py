"""The lab: whole machines on one host, booted from what was baked. README.md beside this file."""
