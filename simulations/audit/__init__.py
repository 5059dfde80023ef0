"""The audit: a run is attacked as it would be run, and what was claimed is held against what the attacks found."""
