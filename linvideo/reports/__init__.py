"""Reports as HTML pages of one file each: their pieces, and the report of a run."""
