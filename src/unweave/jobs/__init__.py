"""The main job, stage by stage: a Spec in, a finished Run out. The command line and the papers' recipes use these."""
