"""Training: what a run is, its folder, and the loop that a killed run resumes."""
