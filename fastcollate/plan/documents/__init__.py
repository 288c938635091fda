"""Documents end to end: cut where a pack ends, or cropped so that each pack begins with a whole one."""
