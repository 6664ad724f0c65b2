"""Plug-ins for other projects' evaluation programs. Each module imports its project only when that project loads it."""
